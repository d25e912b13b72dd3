"""The processes of one run: the rank of this one, and the collectives between them.

All processes call every collective in the same order.  With a single process each returns its input at once, so that
callers need no branch for it.  ``process_group`` creates the group from the environment that torchrun sets.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from potstill.distributed.launch import heartbeat_timeout, is_torchrun_launched, ranks_and_counts, restart_count
from potstill.distributed.watchdog import Watchdog
from potstill.errors import UsageError, WorkerError

Value = TypeVar("Value")


class ProgressCounters(Protocol):
    """What other processes see of this one; ``watching.Watching``."""

    place: int
    moves: int
    steps: int


@dataclass(frozen=True)
class ProcessGroup:
    """One of ``count`` processes.

    Attributes:
        rank: which one, from 0.
        count: of all machines.
        local_rank, local_count: the same among those of this machine.
        watch: notes how far this process is, for the others; None: there are none.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    watch: ProgressCounters | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes the run folder and talks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, value: Value) -> Value:
        """The value that the first process has."""
        if not self.several:
            return value
        held: list[Any] = [value]
        with self.together():
            dist.broadcast_object_list(held, src=0)
        found: Value = held[0]
        return found

    def gather(self, value: Value) -> list[Value]:
        """The values of all, by rank."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.count
        with self.together():
            dist.all_gather_object(found, value)
        return found

    def highest(self, *values: int) -> tuple[int, ...]:
        """Of each number the largest that any process has."""
        if not self.several:
            return values
        held = torch.tensor(values, dtype=torch.int64)
        with self.together():
            dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return tuple(held.tolist())

    def add(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all processes of tensors that have the same shapes in each."""
        if not self.several:
            return dict(tensors)
        found = {}
        with self.together():
            for name in sorted(tensors):
                found[name] = tensors[name].clone()
                dist.all_reduce(found[name])
        return found

    @torch.no_grad()
    def share_tensors(self, tensors: list[Tensor]) -> None:
        """Fill these tensors, in place, with what they are in the first process."""
        if not self.several or not tensors:
            return
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        with self.together():
            for alike in by_kind.values():  # one message for all of a kind: there may be hundreds of small ones
                flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
                dist.broadcast(flat, src=0)
                sizes = [tensor.numel() for tensor in alike]
                for tensor, part in zip(alike, torch.split(flat, sizes), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def share_state(self, module: nn.Module) -> None:
        """Give a module the parameters and buffers that it has in the first process."""
        self.share_tensors(list(module.state_dict(keep_vars=True).values()))

    def progress(self) -> None:
        """Note that this process gets on."""
        if self.watch is not None:
            self.watch.moves += 1

    def mark(self) -> None:
        """Note that this process has come to a point that all processes pass in the same order."""
        if self.watch is not None:
            self.watch.place += 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around whatever waits for the others."""
        self.mark()
        yield
        self.mark()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around a training step: a process that stands still in it for ``POTSTILL_TIMEOUT`` seconds counts as lost.

        Elsewhere (files are read, decoded or written) a process may take as long as it needs.
        """
        if self.watch is None:
            yield
            return
        self.watch.steps += 1
        try:
            yield
        finally:
            self.watch.steps -= 1
            self.watch.moves += 1


SINGLE_PROCESS = ProcessGroup()


_START_SECONDS = 600.0  # seconds until all have begun
_COLLECTIVE_TIMEOUT = timedelta(days=30)  # until a collective gives up by itself: ``Watchdog`` finds out who is lost


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun has started; a process that was started by itself is alone.

    After an error SIGTERM and SIGINT are ignored, so that the message can be shown: the process is to end.

    Raises:
        WorkerError: the others cannot be found, or one of them is lost (``RankLost``).
        UsageError: fewer GPUs than processes on this machine, or an environment that is not torchrun's.
        Elsewhere: another process has failed and has said why.
    """
    if not is_torchrun_launched():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank, local_count = ranks_and_counts()
    patience = max(heartbeat_timeout(), _START_SECONDS)
    _choose_gpu(local_rank, local_count)
    try:
        store, _, _ = next(rendezvous("env://", rank, count, timeout=timedelta(seconds=patience)))
        store = PrefixStore(f"potstill {restart_count()}", store)  # nothing of processes that are gone
        watching = Watchdog(PrefixStore("watching", store), rank, count)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the other processes of the run cannot be reached: {str(error).splitlines()[0]}") from error
    group = ProcessGroup(rank, count, local_rank, local_count, watching)
    failure: BaseException | None = None
    try:
        if not watching.wait_for_all(patience):
            raise WorkerError(f"not all of the {count} processes have begun within {patience:g} seconds")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_COLLECTIVE_TIMEOUT)
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
