"""The process beside a run that talks to one tracker: messages come on stdin, a line of JSON each.

A process and not a thread: the packages take seconds to import and print as they like, a server may not answer, and
none of that may reach the training.  It says one line when it fails, on what was its stdout, and ends.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

from potstill.tracking.kinds import open_sink
from potstill.tracking.settings import TrackerSettings


def main() -> int:
    """Until stdin ends; 1 where the tracker has failed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the run decides when it is over, and closes stdin
        signal.signal(number, signal.SIG_IGN)
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the packages print
    try:
        listen(sys.stdin)
    except Exception as error:  # a foreign package may raise anything
        line = next(iter(str(error).strip().splitlines()), "")
        told.write(f"{type(error).__name__}: {line}"[:300] + "\n")
        told.flush()
        return 1
    return 0


def listen(messages: IO[str]) -> None:
    """Pass every message on to the tracker that the first one names."""
    first = json.loads(messages.readline())
    settings = TrackerSettings.model_validate(first["settings"])
    sink = open_sink(settings, Path(first["run"]), first["identity"], first["parameters"])
    finished = False
    for line in messages:
        message: dict[str, Any] = json.loads(line)
        kind = message.pop("kind")
        if kind == "epoch":
            sink.epoch(message["stage"], message["epoch"], message["figures"])
        elif kind == "final":
            sink.final(message["figures"], message["verdict"])
        elif kind == "files":
            sink.files([Path(each) for each in message["paths"]])
        else:
            finished = message["finished"]
    sink.close(finished)


if __name__ == "__main__":
    # Without waiting for threads that a package may have left behind.
    code = main()
    sys.stderr.flush()
    os._exit(code)
