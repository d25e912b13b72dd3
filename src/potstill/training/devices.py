"""Device, precision and memory layout of a run, and data-parallel training over several processes."""

import ctypes
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from potstill.distillation.distiller import Distiller
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import StorageError, UsageError, first_line, storage_error
from potstill.evaluation.metrics import BUFFER_ROWS, StreamingMetrics, TermAverages
from potstill.formatting import format_scaled
from potstill.methods.base import Method
from potstill.training.averaging import batch_norm_layers
from potstill.training.settings import TrainingSettings
from potstill.types import Step

if TYPE_CHECKING:
    from potstill.data.loader import Loader


# `DistributedDistiller` does this itself, and seldom.  torch 2.15 renames the option and warns about the old name.
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


def check_distributed_support(method: Method, optimizer: str, processes: ProcessGroup) -> None:
    """Raise UsageError if several processes train a method with a memory, or an optimizer that runs backward twice."""
    if not processes.several:
        return
    if method.needs.index:
        raise UsageError(
            f"{method.label} remembers every training image, and {processes.count} processes would each "
            "remember a part: start one process, or use kd or dist"
        )
    if optimizer.lower() == "dot":
        raise UsageError(
            f"the optimizer dot runs backward twice, which {processes.count} processes cannot share: start one "
            "process, or set training.optimizer=sgd"
        )


def has_static_graph(distiller: Distiller, settings: TrainingSettings) -> bool:
    """Return whether every step uses the same parameters: without adapters, stages, ``freeze`` and accumulation."""
    adapters = any(parameter.requires_grad for parameter in distiller.method.parameters())
    return not (adapters or distiller.method.staged or settings.freeze or settings.gradient_accumulation_steps > 1)


class _TensorOutputs(nn.Module):
    """A Distiller that returns logits and terms: in a ``Step``, torch would not find the tensors of a static graph."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        step = self.distiller(*args, **kwargs)
        return step.logits, step.terms


class DistributedDistiller:
    """A Distiller whose trained part is equal in all processes after every step.

    Student and adapters start from the first process's weights; gradients are averaged over the images of all
    processes.  Running statistics of BatchNorm, which training does not read, become the first process's at the end of
    each epoch.  Frozen teachers are not communicated.
    """

    def __init__(self, distiller: Distiller, processes: ProcessGroup, *, static_graph: bool = False) -> None:
        self.distiller, self.processes = distiller, processes
        self.module: DistributedDataParallel | None = None
        if processes.several and distiller.trained_parameters():
            processes.share_tensors(list(distiller.state_dict(keep_vars=True).values()))
            self.module = DistributedDataParallel(
                _TensorOutputs(distiller),
                init_sync=False,
                gradient_as_bucket_view=True,
                static_graph=static_graph,
                find_unused_parameters=not static_graph,
                **_NO_BUFFER_SYNC,
            )
        statistics = {id(each) for layer in batch_norm_layers(distiller) for each in layer.buffers(recurse=False)}
        buffers = [
            buffer
            for name, buffer in distiller.method.named_buffers()
            if id(buffer) not in statistics and not name.startswith("label_loss.")
        ]
        self.method_buffers = buffers  # memories and centres, which the next step reads

    def call(self, *args: Any, **kwargs: Any) -> Step:
        """Run the Distiller's forward pass."""
        if self.module is None:
            step: Step = self.distiller(*args, **kwargs)
            return step
        logits, terms = self.module(*args, **kwargs)
        return Step(logits, terms, self.distiller.method.label_term_names)

    def batch_number(self, loader: "Loader", position: int) -> tuple[int, bool]:
        """Return the number, from 1, of this process's batch at ``position`` of val or test among those of all
        processes, and whether every process has one there.
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

    def sync_method_buffers(self) -> None:
        """Copy the first process's memories of the method to all; call after an update."""
        self.processes.share_tensors(self.method_buffers)

    def sync_buffers(self, average: nn.Module | None = None) -> None:
        """Copy the first process's buffers to all, and those of the averaged weights; call before an evaluation."""
        buffers = [tensor for name, tensor in self.distiller.named_buffers() if not name.startswith("teacher.")]
        self.processes.share_tensors([*buffers, *(average.buffers() if average is not None else ())])

    def gather(self, metrics: StreamingMetrics, averages: TermAverages) -> tuple[StreamingMetrics, TermAverages] | None:
        """Return metrics and term averages over the images of all processes; None in all but the first."""
        if not self.processes.several:
            return metrics, averages
        tensors, facts = averages.pack()
        steps = self.processes.collect(({name: tensor.cpu() for name, tensor in tensors.items()}, facts))
        found = gather_metrics(metrics, self.processes)
        if steps is None or found is None:
            return None
        merged = TermAverages()
        merged.merge(steps)
        return found, merged


def gather_metrics(metrics: StreamingMetrics, processes: ProcessGroup) -> StreamingMetrics | None:
    """Return the metrics over the images of all processes, in the first one; they are those of a single process."""
    sizes = processes.gather((metrics.held, metrics.binned))
    merged = StreamingMetrics(metrics.num_classes, device=metrics.device) if processes.first else None
    if any(binned for _, binned in sizes) or sum(held for held, _ in sizes) > BUFFER_ROWS:
        sums = processes.add_on_first(metrics.state())
        if merged is not None:
            merged.merge(sums)
        return merged
    for rows in processes.collect(tuple(tensor.cpu() for tensor in metrics.rows)) or ():
        assert merged is not None  # this is the first process
        merged.update(*rows)
    return merged


@contextmanager
def synced_batch_norm(network: nn.Module, processes: ProcessGroup, enabled: bool) -> Iterator[None]:
    """Within the block, BatchNorm layers use the statistics of the images of all processes, by torch's SyncBatchNorm.

    Only the classes of torch's layers, and timm's with an activation, change, and are restored, so that parameters,
    paths and saved models stay the same.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    if enabled and processes.several:
        for layer in network.modules():
            synced = _synced_class(layer)
            if synced is not None:
                changed.append((layer, type(layer)))
                layer.__class__, layer.process_group = synced, None  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, original in changed:
            layer.__class__ = original
            del layer.process_group


def _synced_class(layer: nn.Module) -> type[nn.Module] | None:
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.SyncBatchNorm
    if type(layer).__name__ == "BatchNormAct2d" and type(layer).__module__.startswith("timm."):
        from timm.layers import SyncBatchNormAct

        synced: type[nn.Module] = SyncBatchNormAct
        return synced
    return None


_VECTOR_CHANNELS = 16  # float32 numbers of an AVX-512 register; 8 of AVX2


@dataclass(frozen=True)
class Compute:
    """Device, precision, memory layout and process group of a training."""

    device: torch.device
    bf16: bool
    channels_last: bool
    processes: ProcessGroup = SINGLE_PROCESS
    fast_bf16: bool | None = None  # whether the hardware and the settings allow bf16; None: as ``bf16``
    fp16: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context; weights stay float32.  The gradients of fp16 are scaled, those of bf16 not."""
        if not (self.bf16 or self.fp16):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.bf16 else torch.float16)

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """Return the scaler of the loss, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.fp16)

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Dtype of the weights in which frozen teachers may run."""
        if self.teacher_in_bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

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
        """Precision of convolutions and matrix products: "bf16", "fp16" or "float32"."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"

    def for_training(self, network: nn.Module) -> "Compute":
        """Return this, without channels last on a CPU for a network whose gradients torch would write out of bounds.

        Seen with torch 2.15 (oneDNN, AVX2) as "double free or corruption": a 1x1 convolution with a stride, of more
        input channels than one and fewer than fill a vector register, in channels last.  Pruning makes such layers.
        """
        faulty = self.device.type == "cpu" and any(
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and layer.stride != (1, 1)
            and 1 < layer.in_channels < _VECTOR_CHANNELS
            for layer in network.modules()
        )
        return replace(self, channels_last=False) if faulty else self

    def place(self, network: nn.Module, name: str) -> None:
        """Move a network to the device.

        Args:
            network: on any device.
            name: of its stage, for messages.

        Raises:
            StorageError: there is too little memory for its weights; names the bytes needed and the ways out.
        """
        try:
            network.to(self.device)
        except (RuntimeError, MemoryError) as error:
            if storage_error(error) is None:
                raise
            network.to("cpu")  # frees what was moved
            need = sum(each.numel() * each.element_size() for each in network.state_dict().values())
            there = ""
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                there = f", of which {format_scaled(free, 'B')} of {format_scaled(total, 'B')} are free"
            others = "" if self.device.type == "cpu" else "train on the CPU (--device cpu), "
            raise StorageError(
                f"{name}: its weights take {format_scaled(need, 'B')}, too much for the memory of {self.device}{there}."
                f"\nTo go on, end other programs that use it (nvidia-smi lists those of a GPU), {others}take a smaller "
                "network, or, for a teacher, compute its answers once on a machine with room and give them as a table "
                "(--teacher answers.parquet, see docs/teachers.md)"
            ) from error

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

    Channels last makes a step 1.0 to 1.4 times as fast, on a CPU too.  GPUs with tensor cores but without bf16 (V100,
    T4, RTX 20) get fp16, in which a CPU is hundreds of times slower.  On CUDA, matrix products in float32 use TF32, as
    convolutions do by default, and cuDNN times its algorithms.
    """
    if settings.threads != "auto":
        torch.set_num_threads(settings.threads)
    device = _resolve_device(settings.device, processes)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    elif settings.sync_batch_norm and processes.several:
        raise UsageError(
            f"training.sync_batch_norm needs GPUs, and the device is {device}: leave it out, or raise "
            "training.batch_size, so that each process has enough images"
        )
    dot = settings.optimizer.lower() == "dot"
    if settings.precision == "fp16" and dot:
        raise UsageError(
            "the optimizer dot keeps two gradients, whose loss scale fp16 cannot adapt: set training.precision to bf16 "
            "or float32, or training.optimizer=sgd"
        )
    automatic = settings.precision == "auto"
    bf16 = _has_bf16(device) if automatic else settings.precision == "bf16"
    fp16 = settings.precision == "fp16"
    if automatic and not bf16 and device.type == "cuda" and not dot:
        fp16 = torch.cuda.get_device_capability(device) >= (7, 0)  # has tensor cores for it
    if settings.channels_last == "auto":
        channels_last = device.type in ("cuda", "cpu")
    else:
        channels_last = settings.channels_last
    return Compute(device, bf16, channels_last, processes, fp16=fp16)


def _glibc() -> ctypes.CDLL | None:
    allocator = ctypes.CDLL(None) if sys.platform == "linux" else None
    return allocator if hasattr(allocator, "gnu_get_libc_version") else None


def return_freed_memory() -> None:
    """Give the system back what ``keep_freed_memory`` holds: a teacher's gigabytes, before a small student."""
    if allocator := _glibc():
        allocator.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Let glibc keep freed tensors for the next step, a fifth of the CPU time; return whether it does."""
    allocator = _glibc()
    if allocator is None:
        return False
    # The numbers of M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h; older versions of glibc allow 32 MiB at most.
    kept = allocator.mallopt(-3, 1 << 30) or allocator.mallopt(-3, 1 << 25)
    return bool(kept and allocator.mallopt(-1, (1 << 31) - 1))


def idle_gpus(compute: Compute) -> str:
    """Return a sentence if this machine has more GPUs than the run uses; else ""."""
    if compute.device.type != "cuda":
        return ""
    used, there = compute.processes.local_count, torch.cuda.device_count()
    if compute.processes.several and there == 1:  # each process sees its own
        return ""
    return (
        f"{used} of the {there} GPUs of this machine {'is' if used == 1 else 'are'} used; --gpus all uses all of them"
        if used < there
        else ""
    )


def _resolve_device(name: str, processes: ProcessGroup) -> torch.device:
    if processes.several and name.startswith("cuda:"):
        raise UsageError(
            f"training.device {name!r} is one GPU, and each of the {processes.count} processes uses another: leave it "
            f"out, and choose the GPUs with CUDA_VISIBLE_DEVICES={name.removeprefix('cuda:')},..."
        )
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"training.device {name!r} cannot be used: {first_line(error)}\nAllowed: auto, cpu, cuda, cuda:N, mps"
        ) from None
    return device


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public function for this
    return device.type == "cpu" and supported is not None and bool(supported())
