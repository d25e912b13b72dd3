"""The processes of one run: which of them this one is, and how they agree.

Every method that talks to the others is called by all processes in the same order.  With a single process they return
at once what they were given, so that nobody who calls them has to ask how many there are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


class Watch(Protocol):
    """What other processes see of this one; ``watching.Watching``."""

    place: int
    moves: int
    steps: int


@dataclass(frozen=True)
class Processes:
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
    watch: Watch | None = None

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


ALONE = Processes()
