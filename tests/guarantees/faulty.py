"""``potstill`` with a mistake of one rank: torchrun starts ``faulty.py MISTAKE STEP ...`` in place of ``-m potstill``.

Not a test by itself.
"""

import os
import sys
import time

from potstill.cli import main
from potstill.errors import DataError
from potstill.training.sharing import Sharing


def meet(mistake):
    if mistake == "bug":
        raise ZeroDivisionError("one by nothing")
    if mistake == "data":
        raise DataError("photographs/cat.png can no longer be read")
    while True:  # "hang"
        time.sleep(0.1)


def begin(mistake, step):
    settle, calls = Sharing.settle, []

    def settle_once_more(self):
        calls.append(1)
        if len(calls) == step and os.environ["RANK"] == "1":
            meet(mistake)
        settle(self)

    Sharing.settle = settle_once_more


if __name__ == "__main__":
    begin(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
