"""Data-parallel training in several processes: averaged gradients, metrics over the images of all of them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from potstill.distillation.distiller import Distiller
from potstill.distributed.group import ProcessGroup
from potstill.errors import UsageError
from potstill.evaluation.metrics import BUFFER_ROWS, StreamingMetrics
from potstill.methods.base import Method
from potstill.training.state import TermAverages

if TYPE_CHECKING:
    from potstill.data.loader import Loader


# See `Sharing.settle`.  The option has another name from torch 2.15 on, where the old one warns.
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


def check_distributed_support(method: Method, optimizer: str, processes: ProcessGroup) -> None:
    """Some things live in one process only.

    Raises:
        UsageError: the method remembers training samples, or the optimizer runs backward twice, and there are several
            processes.
    """
    if not processes.several:
        return
    if method.needs.index:
        raise UsageError(
            f"{type(method).__name__} remembers every training image, and {processes.count} processes would each "
            "remember a part: start one process, or use kd or dist"
        )
    if optimizer == "dot":
        raise UsageError(
            f"the optimizer dot runs backward twice, which {processes.count} processes cannot share: start one "
            "process, or set training.optimizer=sgd"
        )


class DistributedDistiller:
    """A Distiller whose trained part is the same in all processes after every step.

    Student and adapters begin as they are in the first process; gradients are averaged over the images of all; running
    statistics of BatchNorm are those that the first process sees.  Frozen teachers are never sent anywhere.

    Args:
        distiller: on its device.
        processes: who shares; a single one changes nothing.
    """

    def __init__(self, distiller: Distiller, processes: ProcessGroup) -> None:
        self.distiller, self.processes = distiller, processes
        self.call: nn.Module = distiller
        self.whole: DistributedDataParallel | None = None
        if processes.several and distiller.trained_parameters():
            processes.share_tensors(list(distiller.state_dict(keep_vars=True).values()))
            # A last batch may leave an adapter out, so that unused parameters are looked for.
            self.whole = DistributedDataParallel(
                distiller, init_sync=False, find_unused_parameters=True, **_NO_BUFFER_SYNC
            )
            self.call = self.whole
        self.buffers = [tensor for name, tensor in distiller.named_buffers() if not name.startswith("teacher.")]

    def place(self, loader: "Loader", position: int) -> tuple[int, bool]:
        """Of a process's batch number ``position`` of val or test: its number among all, from 1, and whether every
        process has one at this position.
        """
        if not self.processes.several:
            return position + 1, True
        return position * self.processes.count + self.processes.rank + 1, position < loader.common_steps

    def loss_weight(self, images: int, of: int) -> float:
        """What the mean over one's own images weighs, so that the mean over processes is that over all images."""
        return images * self.processes.count / of

    @contextmanager
    def step(self, complete: bool) -> Iterator[None]:
        """Around forward and backward; gradients are exchanged in the last of several that belong to one update."""
        if self.whole is None:
            yield
        elif complete:
            with self.processes.together():
                yield
        else:
            with self.whole.no_sync():
                yield

    def settle(self) -> None:
        """After an update: buffers as they are in the first process."""
        self.processes.share_tensors(self.buffers)

    def figures(self, metrics: StreamingMetrics, averages: TermAverages) -> tuple[StreamingMetrics, TermAverages]:
        """Of the images of all processes."""
        if not self.processes.several:
            return metrics, averages
        terms = TermAverages()
        terms.join(self.processes.gather(_pack_on_cpu(averages)))
        return gather_metrics(metrics, self.processes), terms


def gather_metrics(metrics: StreamingMetrics, processes: ProcessGroup) -> StreamingMetrics:
    """The figures of the images of all processes; as one process would have them, but for the order of the images."""
    known = processes.gather((metrics.held, metrics.binned))
    found = StreamingMetrics(metrics.num_classes, device=metrics.device)
    if any(binned for _, binned in known) or sum(held for held, _ in known) > BUFFER_ROWS:
        found.merge(processes.add(metrics.state()))
        return found
    for rows in processes.gather(tuple(tensor.cpu() for tensor in metrics.rows)):
        found.update(*rows)
    return found


def _pack_on_cpu(averages: TermAverages) -> tuple[dict[str, torch.Tensor], list[Any]]:
    tensors, facts = averages.pack()
    return {name: tensor.cpu() for name, tensor in tensors.items()}, facts
