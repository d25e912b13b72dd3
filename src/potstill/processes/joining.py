"""From the environment that torchrun gives to a group of processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from potstill.errors import UsageError, WorkerError
from potstill.processes.group import ALONE, Processes
from potstill.processes.launch import attempt, launched, place, timeout
from potstill.processes.watching import Watching

_BEGIN = 600.0  # seconds until all have begun
_NEVER = timedelta(days=30)  # until a collective gives up by itself: ``Watching`` finds out who is lost


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun has started; a process that was started by itself is alone.

    After an error SIGTERM and SIGINT are ignored, so that the message can be shown: the process is to end.

    Raises:
        WorkerError: the others cannot be found, or one of them is lost (``RankLost``).
        UsageError: fewer GPUs than processes on this machine, or an environment that is not torchrun's.
        Elsewhere: another process has failed and has said why.
    """
    if not launched():
        yield ALONE
        return
    rank, count, local_rank, local_count = place()
    patience = max(timeout(), _BEGIN)
    _choose_gpu(local_rank, local_count)
    try:
        store, _, _ = next(rendezvous("env://", rank, count, timeout=timedelta(seconds=patience)))
        store = PrefixStore(f"potstill {attempt()}", store)  # nothing of processes that are gone
        watching = Watching(PrefixStore("watching", store), rank, count)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the other processes of the run cannot be reached: {str(error).splitlines()[0]}") from error
    group = Processes(rank, count, local_rank, local_count, watching)
    failure: BaseException | None = None
    try:
        if not watching.all_here(patience):
            raise WorkerError(f"not all of the {count} processes have begun within {patience:g} seconds")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_NEVER)
        yield group
        group.highest(0)  # nobody leaves while another still needs him
    except BaseException as error:
        failure = error
    end = watching.end(failure)
    if end is not None and end is not failure:
        raise end from failure
    if end is not None:
        raise end
    dist.destroy_process_group()


def _choose_gpu(local_rank: int, local_count: int) -> None:
    if not torch.cuda.is_available():
        return
    if torch.cuda.device_count() < local_count:
        raise UsageError(
            f"{local_count} processes on a machine with {torch.cuda.device_count()} GPUs: "
            "start one per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    torch.cuda.set_device(local_rank)
