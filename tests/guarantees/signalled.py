"""``potstill`` that gets a signal when it comes to a place: ``signalled.py PLACE SIGNAL TIMES ...``.  No test.

PLACE is module:function, or module:class.method, SIGNAL a name, TIMES how often in a row the place is passed before.
A SIGNAL like SIGTERM+hang: the process then hangs, as in a step that does not end.
"""

import importlib
import os
import signal
import sys
import time

from potstill.cli import main


def begin(place, name, times):
    module, _, path = place.partition(":")
    *above, last = path.split(".")
    owner = importlib.import_module(module)
    for each in above:
        owner = getattr(owner, each)
    original, calls = getattr(owner, last), []
    name, _, afterwards = name.partition("+")

    def passing(*arguments, **options):
        calls.append(1)
        if len(calls) == times + 1:
            for number in name.split(","):
                os.kill(os.getpid(), getattr(signal, number))
            if afterwards == "hang":
                print("hangs", file=sys.stderr, flush=True)
                while True:
                    time.sleep(0.1)
        return original(*arguments, **options)

    setattr(owner, last, passing)


if __name__ == "__main__":
    begin(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
