"""Changes of the student's forward pass during training: ``torch.compile``, and quantization-aware training.

``torch.compile`` is used if it saves more time than it takes.

Only the call is compiled, and only within the training part of an epoch: the module that is copied, evaluated and saved
never changes.  On a CPU, compiling takes a minute and gains nothing, so "auto" means CUDA only.

Quantization-aware training rounds weights and inputs to int8 in the forward pass.  Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from potstill.distillation.distiller import Distiller
from potstill.errors import first_line
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute
from potstill.training.optim import DOT
from potstill.training.settings import TrainingSettings

EXPECTED_SAVING = 0.2  # assumed share of a step's time that compiling saves
COMPILE_SECONDS = 90.0  # assumed time that compiling takes
MAX_CUDA_GRAPH_IMAGES = 128  # in batches up to this size, launching kernels takes longer than running them
WARMUP_STEPS = 3  # the first compiles, the second records the CUDA graphs, the third replays them

ForwardCall = Callable[[Tensor], Tensor]


def is_worth_compiling(steps_left: int, seconds_per_step: float) -> bool:
    """Return whether compiling is expected to save more time than it takes.

    Example:
        >>> is_worth_compiling(100, 0.1), is_worth_compiling(100_000, 0.1)
        (False, True)
    """
    return steps_left * seconds_per_step * EXPECTED_SAVING > COMPILE_SECONDS


class StudentCompiler:
    """Compiles the student's forward pass; enter ``epoch`` around each epoch and call ``prepare`` at its first batch.

    "auto", on CUDA, leaves the first epoch uncompiled and compiles the second if its duration shows that this pays.  If
    a compiled epoch then turns out slower, the next ones are uncompiled again.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        compute: Compute,
        observer: Observer,
        *,
        compile: Callable[..., ForwardCall] = torch.compile,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.student, self.settings, self.compute, self.observer = distiller.student, settings, compute, observer
        self.compile, self.clock = compile, clock
        requested = settings.compile is True or (settings.compile == "auto" and compute.device.type == "cuda")
        supported = (
            "forward" not in vars(self.student)
            and not distiller.router.extractor.uses_hooks  # which are not called inside a compiled network
            and not isinstance(optimizer, DOT)
            and not settings.qat_fraction
        )
        self.enabled = requested and supported
        if settings.compile is True and not supported:
            observer.note("not compiled: the method reads more than logits, int8 is simulated, or backward runs twice")
        self.two_forward_passes = distiller.method.needs.second != "none"
        self.compiled_forward: ForwardCall | None = None
        self.batch_shape = torch.Size()  # the only one that the compiled call takes
        self.plain_epochs: list[float] = []  # seconds per step
        self.compiled_epochs: list[float] = []
        self._steps_left = 0

    @contextmanager
    def epoch(self, steps: int, left: int) -> Iterator[None]:
        """Enter around the ``steps`` training steps of an epoch, of ``left`` until the end of the training."""
        self._steps_left, started = left, self.clock()
        try:
            yield
        finally:
            compiled = vars(self.student).pop("forward", None) is not None
        seconds = (self.clock() - started) / max(steps, 1)
        (self.compiled_epochs if compiled else self.plain_epochs).append(seconds)
        self._compare()

    def prepare(self, images: Tensor) -> None:
        """Compile for batches of this shape if that is enabled and pays; ``images`` is the epoch's first batch."""
        if not self.enabled:
            return
        if self.compiled_forward is None:
            if self.settings.compile == "auto" and not (
                self.plain_epochs and is_worth_compiling(self._steps_left, statistics.median(self.plain_epochs))
            ):
                return
            self._compile(images)
        if self.compiled_forward is not None:
            self._install(self.compiled_forward)

    def _install(self, call: ForwardCall) -> None:
        uncompiled: ForwardCall = self.student.forward
        cuda_graphs = self._uses_cuda_graphs

        def forward(images: Tensor) -> Tensor:
            if images.shape != self.batch_shape or not torch.is_grad_enabled() or not self.student.training:
                return uncompiled(images)
            if cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return call(images)

        self.student.forward = forward

    @property
    def _uses_cuda_graphs(self) -> bool:
        """CUDA graphs overwrite their last result, so no output may be needed after the next call."""
        return (
            self.compute.device.type == "cuda"
            and len(self.batch_shape) > 0
            and self.batch_shape[0] <= MAX_CUDA_GRAPH_IMAGES
            and self.settings.gradient_accumulation_steps == 1
            and not self.two_forward_passes
        )

    def _compile(self, images: Tensor) -> None:
        self.batch_shape = images.shape
        mode = {"mode": "reduce-overhead"} if self._uses_cuda_graphs else {}
        started = self.clock()
        call = self.compile(self.student.forward, dynamic=False, **mode)
        try:
            self._warm_up(call, images)
        except Exception as error:  # compilers raise anything; training continues without
            self.enabled = False
            self.observer.note(f"not compiled: {first_line(error)}")
            return
        self.compiled_forward = call
        how = " with CUDA graphs" if self._uses_cuda_graphs else ""
        self.observer.note(f"the student's forward pass is compiled{how}: {self.clock() - started:.0f} s")

    def _warm_up(self, call: ForwardCall, images: Tensor) -> None:
        images = images.contiguous(memory_format=self.compute.memory_format)
        saved_buffers = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        devices = [self.compute.device] if self.compute.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                for _ in range(WARMUP_STEPS):
                    if self._uses_cuda_graphs:
                        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                    with self.compute.autocast():
                        logits = call(images)
                    logits.float().logsumexp(dim=1).sum().backward()  # type: ignore[no-untyped-call]
                    self.student.zero_grad(set_to_none=True)
        finally:
            self.student.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, value in saved_buffers:
                    buffer.copy_(value)

    def _compare(self) -> None:
        """Go back if compiled epochs are slower; the first does not count, as it includes compiling."""
        if self.settings.compile != "auto" or self.compiled_forward is None or len(self.compiled_epochs) < 2:
            return
        compiled, plain = statistics.median(self.compiled_epochs[1:]), statistics.median(self.plain_epochs)
        if compiled >= plain:
            self.compiled_forward, self.enabled = None, False
            self.observer.note(
                f"no longer compiled: a step took {compiled:.3g} s, and {plain:.3g} s before it was compiled"
            )


QUANTIZED_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_MIN_SCALE = 1e-12  # for a channel or an image that is all zeros


@contextmanager
def simulated_int8(network: nn.Module) -> Iterator[None]:
    """Within the block, round weights and inputs of convolutions and linear layers as int8 does.

    Weights are rounded to 255 levels, symmetric about 0, with a scale per output channel; inputs to 256 levels between
    the batch's minimum and maximum, including 0.  ``potstill export --int8`` takes the range over its calibration
    images, and folds a BatchNorm into the layer, which multiplies each channel's scale.  Gradients pass the rounding
    unchanged and are 0 outside of the range.  There is no state between batches.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.27, 0.004]]))
        >>> with simulated_int8(layer):
        ...     rounded = layer(torch.tensor([[0.0, 255.0]]))
        >>> round(rounded.item(), 4), round(layer(torch.tensor([[0.0, 255.0]])).item(), 4)
        (0.0, 1.02)
    """
    layers = [each for each in network.modules() if isinstance(each, QUANTIZED_LAYERS)]
    hooks = [each.register_forward_pre_hook(_quantize_hook) for each in layers]
    hooks += [each.register_forward_hook(_restore_hook, always_call=True) for each in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plain_epochs(epochs: int, qat_fraction: float) -> int:
    """Return the number of epochs before quantization-aware training begins.

    Example:
        >>> plain_epochs(10, 0.0), plain_epochs(10, 0.25), plain_epochs(10, 1.0)
        (10, 7, 0)
    """
    return epochs - ceil(round(epochs * qat_fraction, 9))


def _quantize_hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # An instance attribute shadows the parameter of that name, which stays in place.
    vars(layer)["weight"] = fake_quantize_weight(layer._parameters["weight"])  # type: ignore[arg-type]
    return (fake_quantize_input(inputs[0]), *inputs[1:])


def _restore_hook(layer: nn.Module, inputs: Any, output: Any) -> None:
    vars(layer).pop("weight", None)


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Round weights [C, ...] to the int8 grid, -127 to 127, with a scale per output channel."""
    scale = (weight.detach().float().abs().flatten(1).amax(1) / 127).clamp(min=_MIN_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127).to(weight.dtype)


def fake_quantize_input(values: Tensor) -> Tensor:
    """Round values to the int8 grid, -128 to 127, between their minimum and maximum, including 0."""
    detached = values.detach().float()
    low, high = detached.amin().clamp(max=0), detached.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=_MIN_SCALE)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, -128, 127).to(values.dtype)
