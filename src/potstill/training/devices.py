"""Device, precision and memory layout of a run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import UsageError
from potstill.training.settings import TrainingSettings


@dataclass(frozen=True)
class Compute:
    """The device, how numbers and images are laid out on it, and who computes beside."""

    device: torch.device
    bf16: bool
    channels_last: bool
    processes: ProcessGroup = SINGLE_PROCESS
    fast_bf16: bool | None = None  # whether the hardware and the settings allow bf16; None: as ``bf16``

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 for convolutions and matrix products, or nothing; weights stay float32, so no gradient scaling."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @property
    def teachers_in_bf16(self) -> bool:
        """Whether frozen teachers may answer with bf16 weights, in whichever precision the student is trained."""
        return self.bf16 if self.fast_bf16 is None else self.fast_bf16

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def precision(self) -> str:
        """Of convolutions and matrix products."""
        return "bf16" if self.bf16 else "float32"

    def wait(self) -> None:
        """Until the device has done all that it was told; a clock says nothing before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __str__(self) -> str:
        words = [str(self.device), self.precision]
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            words.insert(1, f"{threads} thread{'' if threads == 1 else 's'}")
        if self.processes.several:
            words.insert(0, f"{self.processes.count} processes")
        return ", ".join(words)


def create_compute(settings: TrainingSettings, processes: ProcessGroup = SINGLE_PROCESS) -> Compute:
    """Resolve ``auto``: cuda, then mps, then cpu; bf16 where the hardware computes in it; channels last but on mps.

    Channels last makes a step 1.0 to 1.4 times as fast, on a CPU too.
    Float16 is never chosen: on a CPU its arithmetic is hundreds of times slower than bf16.

    Raises:
        UsageError: a device that is not there.
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
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # there is no public question
    return device.type == "cpu" and supported is not None and bool(supported())
