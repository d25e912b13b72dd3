"""``potstill`` with a mishap of rank 1: torchrun starts ``faulty.py MISHAP STEP ...`` in place of ``-m potstill``.

Not a test by itself.  Each rank writes its process id into ``$POTSTILL_CACHE/pids``.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from potstill.cli import main
from potstill.distributed import restart_count
from potstill.errors import DataError
from potstill.report import render
from potstill.training.devices import DistributedDistiller


def meet(mishap):
    if mishap == "bug":
        raise ZeroDivisionError("one by nothing")
    if mishap == "wrong device":
        raise RuntimeError("Expected all tensors to be on the same device")
    if mishap == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if mishap == "data":
        raise DataError("photographs/cat.png can no longer be read")
    if mishap == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mishap == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mishap == "told":  # the launcher is, as SLURM does
        os.kill(os.getppid(), signal.SIGTERM)
    if mishap == "orphaned":
        os.kill(os.getppid(), signal.SIGKILL)
    while mishap == "hangs":
        time.sleep(0.1)


def begin(mishap, step):
    settle, calls, rank = DistributedDistiller.sync_method_buffers, [], os.environ["RANK"]
    pids = Path(os.environ["POTSTILL_CACHE"]) / "pids"
    pids.mkdir(parents=True, exist_ok=True)
    (pids / rank).write_text(str(os.getpid()))

    def settle_once_more(self):
        calls.append(1)
        if len(calls) == step and rank == "1" and restart_count() == 0:
            meet(mishap)
        settle(self)

    DistributedDistiller.sync_method_buffers = settle_once_more
    render.render = lambda folder: folder / "report.html"  # seconds that show nothing of processes


if __name__ == "__main__":
    begin(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
