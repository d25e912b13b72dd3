"""The processes of one run: the rank of this one, and the collectives between them.

All processes call every collective in the same order.  With a single process, each returns its input, so that callers
need no branch.  ``process_group`` creates the group from the environment that torchrun sets.
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

from potstill.distributed import heartbeat_timeout, is_torchrun_launched, ranks_and_counts, restart_count
from potstill.distributed.watchdog import Watchdog
from potstill.errors import UsageError, WorkerError

Value = TypeVar("Value")


class ProgressCounters(Protocol):
    """The progress that other processes see; see ``Watchdog``."""

    place: int
    moves: int
    steps: int


@dataclass(frozen=True)
class ProcessGroup:
    """One of ``count`` processes.

    Attributes:
        rank: of this process, from 0.
        count: number of processes on all machines.
        local_rank, local_count: on this machine.
        watch: counts the progress of this process; None for a single process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    watch: ProgressCounters | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and the output."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are several processes."""
        return self.count > 1

    def share(self, value: Value) -> Value:
        """Return the first process's value."""
        if not self.several:
            return value
        values: list[Any] = [value]
        with self.together():
            dist.broadcast_object_list(values, src=0)
        found: Value = values[0]
        return found

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.count
        with self.together():
            dist.all_gather_object(found, value)
        return found

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return the maximum of each number over all processes."""
        if not self.several:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with self.together():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def add(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all processes of tensors of equal shapes."""
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
        """Copy the first process's tensors into these, in place."""
        if not self.several or not tensors:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        with self.together():
            for group in groups.values():  # one broadcast per dtype and device: there may be hundreds of small tensors
                flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
                dist.broadcast(flat, src=0)
                sizes = [tensor.numel() for tensor in group]
                for tensor, part in zip(group, torch.split(flat, sizes), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def share_state(self, module: nn.Module) -> None:
        """Copy the first process's parameters and buffers into a module."""
        self.share_tensors(list(module.state_dict(keep_vars=True).values()))

    def progress(self) -> None:
        """Count progress of this process."""
        if self.watch is not None:
            self.watch.moves += 1

    def mark(self) -> None:
        """Count a point that all processes pass in the same order."""
        if self.watch is not None:
            self.watch.place += 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Enter around code that waits for other processes."""
        self.mark()
        yield
        self.mark()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Enter around a training step, in which a process without progress for ``POTSTILL_TIMEOUT`` seconds is lost.

        Elsewhere (reading, decoding and writing files), more time is allowed.
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


_START_SECONDS = 600.0  # until all processes have started
_COLLECTIVE_TIMEOUT = timedelta(days=30)  # of a collective; ``Watchdog`` detects lost processes


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the process group that torchrun has started; without torchrun, yield ``SINGLE_PROCESS``.

    After an error, SIGTERM and SIGINT are ignored, so that the message can be shown.

    Raises:
        WorkerError: other processes cannot be reached, or one is lost (``RankLost``).
        UsageError: fewer GPUs than processes on this machine, or an environment that is not torchrun's.
        RemoteFailure: another process has failed and reported why.
    """
    if not is_torchrun_launched():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank, local_count = ranks_and_counts()
    start_timeout = max(heartbeat_timeout(), _START_SECONDS)
    _choose_gpu(local_rank, local_count)
    try:
        store, _, _ = next(rendezvous("env://", rank, count, timeout=timedelta(seconds=start_timeout)))
        store = PrefixStore(f"potstill {restart_count()}", store)  # without keys of earlier starts
        watchdog = Watchdog(PrefixStore("watching", store), rank, count)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the other processes of the run cannot be reached: {str(error).splitlines()[0]}") from error
    group = ProcessGroup(rank, count, local_rank, local_count, watchdog)
    failure: BaseException | None = None
    try:
        if not watchdog.wait_for_all(start_timeout):
            raise WorkerError(f"not all of the {count} processes have begun within {start_timeout:g} seconds")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_COLLECTIVE_TIMEOUT)
        yield group
        group.highest(0)  # wait for all before leaving
    except BaseException as error:
        failure = error
    end = watchdog.end(failure)
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
