"""Data-parallel training: averaged gradients, metrics over the images of all processes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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


# `DistributedDistiller.sync_buffers` does this.  torch 2.15 renames the option and warns about the old name.
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


def check_distributed_support(method: Method, optimizer: str, processes: ProcessGroup) -> None:
    """Raise UsageError if several processes train a method or optimizer that needs a single one.

    These are methods that remember training samples, and the optimizer that runs backward twice.
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
    """A Distiller whose trained part is equal in all processes after every step.

    Student and adapters start from the first process's weights; gradients are averaged over the images of all
    processes; running statistics of BatchNorm are the first process's.  Frozen teachers are not communicated.

    Args:
        distiller: on its device.
        processes: the group; a single process changes nothing.
    """

    def __init__(self, distiller: Distiller, processes: ProcessGroup) -> None:
        self.distiller, self.processes = distiller, processes
        self.call: nn.Module = distiller
        self.module: DistributedDataParallel | None = None
        if processes.several and distiller.trained_parameters():
            processes.share_tensors(list(distiller.state_dict(keep_vars=True).values()))
            # A last batch may not use all adapters, hence find_unused_parameters.
            self.module = DistributedDataParallel(
                distiller, init_sync=False, find_unused_parameters=True, **_NO_BUFFER_SYNC
            )
            self.call = self.module
        self.buffers = [tensor for name, tensor in distiller.named_buffers() if not name.startswith("teacher.")]

    def batch_number(self, loader: "Loader", position: int) -> tuple[int, bool]:
        """Number val or test batches across processes.

        Returns:
            The number of this process's batch at ``position`` among those of all processes, from 1, and whether every
            process has a batch at this position.
        """
        if not self.processes.several:
            return position + 1, True
        return position * self.processes.count + self.processes.rank + 1, position < loader.common_steps

    def loss_weight(self, images: int, total: int) -> float:
        """Return the weight of a mean over ``images``, such that the mean over processes is that over all ``total``."""
        return images * self.processes.count / total

    @contextmanager
    def step(self, complete: bool) -> Iterator[None]:
        """Enter around forward and backward; ``complete`` (the last ones before an update) exchanges gradients."""
        if self.module is None:
            yield
        elif complete:
            with self.processes.together():
                yield
        else:
            with self.module.no_sync():
                yield

    def sync_buffers(self) -> None:
        """Copy the first process's buffers to all; call after an update."""
        self.processes.share_tensors(self.buffers)

    def gather(self, metrics: StreamingMetrics, averages: TermAverages) -> tuple[StreamingMetrics, TermAverages]:
        """Return metrics and term averages over the images of all processes."""
        if not self.processes.several:
            return metrics, averages
        tensors, facts = averages.pack()
        merged = TermAverages()
        merged.merge(self.processes.gather(({name: tensor.cpu() for name, tensor in tensors.items()}, facts)))
        return gather_metrics(metrics, self.processes), merged


def gather_metrics(metrics: StreamingMetrics, processes: ProcessGroup) -> StreamingMetrics:
    """Return the metrics over the images of all processes, equal to one process's but for the order of the images."""
    sizes = processes.gather((metrics.held, metrics.binned))
    merged = StreamingMetrics(metrics.num_classes, device=metrics.device)
    if any(binned for _, binned in sizes) or sum(held for held, _ in sizes) > BUFFER_ROWS:
        merged.merge(processes.add(metrics.state()))
        return merged
    for rows in processes.gather(tuple(tensor.cpu() for tensor in metrics.rows)):
        merged.update(*rows)
    return merged
