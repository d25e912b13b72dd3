"""The process beside a run that writes to one logger, and the run's side of it.

Messages are queued and never waited for; they go to the process's stdin, a line of JSON each.  A process and not a
thread: the packages take seconds to import and print as they like, a server may not answer, and none of that may reach
the training.  It writes one line when it fails, on what was its stdout, and ends.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess  # nosec B404 # starts our own module, with no word of a user
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from potstill.loggers import LoggerSettings, create_logger

CLOSE_SECONDS = 60.0  # seconds at the end of a run, until a tracker that has not finished is given up
INTERRUPTED_CLOSE_SECONDS = 10.0  # where the run was stopped, perhaps by somebody who will kill it soon
COMMAND = (sys.executable, "-P", "-m", "potstill.loggers.process")


class LoggerProcess:
    """A process that talks to one tracker.

    Args:
        name: of the tracker, for messages.
        command: what is started.
    """

    def __init__(self, name: str, first: dict[str, Any], command: Sequence[str] = COMMAND) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._said: list[str] = []
        self._told = False
        self.process = subprocess.Popen(  # nosec B603 # COMMAND, or what a test gives
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the training
        )
        self._threads = [
            threading.Thread(target=call, daemon=True) for call in (self._write_messages, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()
        self.send(first)

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; costs microseconds, whatever the tracker does."""
        self._queue.put(json.dumps(message))

    @property
    def problem(self) -> str | None:
        """Why the tracker gets nothing any more: said once."""
        failed = self._said or self.process.poll() not in (None, 0)
        if self._told or not failed:
            return None
        self._told = True
        return self._warning(self._said[0] if self._said else "its process has ended")

    def close(self, wait: float = CLOSE_SECONDS) -> str | None:
        """Wait until all is sent, at most so many seconds; returns a problem that nobody has been told yet."""
        self._queue.put(None)
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            if not self._said:
                self._said.append(f"it has not answered for {wait:g} seconds")
        for thread in self._threads:
            thread.join(1.0)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
        return self.problem

    def _warning(self, why: str) -> str:
        return f"tracker {self.name} gets no more of this run, which goes on without it: {why}"

    def _write_messages(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended: `_hear` knows why
            while (line := self._queue.get()) is not None:
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
            self.process.stdin.close()

    def _read_errors(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self.process.stdout:
                self._said.append(line.strip())


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
    settings = LoggerSettings.model_validate(first["settings"])
    sink = create_logger(settings, Path(first["run"]), first["identity"], first["parameters"])
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
