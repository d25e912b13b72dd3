"""Device, precision and memory layout of a run, and data-parallel training over several processes."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from potstill.distillation.distiller import Distiller
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import UsageError
from potstill.evaluation.metrics import BUFFER_ROWS, StreamingMetrics, TermAverages
from potstill.methods.base import Method
from potstill.training.settings import TrainingSettings

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


@dataclass(frozen=True)
class Compute:
    """Device, precision, memory layout and process group of a training."""

    device: torch.device
    bf16: bool
    channels_last: bool
    processes: ProcessGroup = SINGLE_PROCESS
    fast_bf16: bool | None = None  # whether the hardware and the settings allow bf16; None: as ``bf16``

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context; weights stay float32 and bf16 needs no gradient scaling."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @property
    def teacher_in_bf16(self) -> bool:
        """Whether frozen teachers may run with bf16 weights, whatever the precision of the student's training."""
        return self.bf16 if self.fast_bf16 is None else self.fast_bf16

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def precision(self) -> str:
        """Precision of convolutions and matrix products: "bf16" or "float32"."""
        return "bf16" if self.bf16 else "float32"

    def synchronize(self) -> None:
        """Wait for the device's queued work; call before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __str__(self) -> str:
        parts = [str(self.device), self.precision]
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            parts.insert(1, f"{threads} thread{'' if threads == 1 else 's'}")
        if self.processes.several:
            parts.insert(0, f"{self.processes.count} processes")
        return ", ".join(parts)


def create_compute(settings: TrainingSettings, processes: ProcessGroup = SINGLE_PROCESS) -> Compute:
    """Resolve ``auto``: cuda, then mps, then cpu; bf16 if the hardware computes in it; channels last except on mps.

    Channels last makes a step 1.0 to 1.4 times as fast, on a CPU too.  Float16 is never chosen: on a CPU it is hundreds
    of times slower than bf16.

    Raises:
        UsageError: the device does not exist.
    """
    if settings.threads != "auto":
        torch.set_num_threads(settings.threads)
    device = _resolve_device(settings.device)
    bf16 = _has_bf16(device) if settings.precision == "auto" else settings.precision == "bf16"
    if settings.channels_last == "auto":
        channels_last = device.type in ("cuda", "cpu")
    else:
        channels_last = settings.channels_last
    return Compute(device, bf16, channels_last, processes)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"training.device {name!r} cannot be used: {reason}\nAllowed: auto, cpu, cuda, cuda:N, mps"
        ) from None
    return device


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public function for this
    return device.type == "cpu" and supported is not None and bool(supported())
