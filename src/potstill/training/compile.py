"""``torch.compile`` for the student's forward pass, where it saves more time than it takes.

Only the call is compiled, and only within the training part of an epoch: the module that is copied, evaluated and saved
never changes.  On a CPU compiling takes a minute and gains nothing, so that "auto" means CUDA.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from potstill.distillation.distiller import Distiller
from potstill.features.hooks import FeatureRequest
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute
from potstill.training.optim import SplitGradientOptimizer
from potstill.training.settings import TrainingSettings

EXPECTED_SAVING = 0.2  # of the time of a step, that compiling is supposed to save
COMPILE_SECONDS = 90.0  # that it is supposed to take
MAX_CUDA_GRAPH_IMAGES = 128  # up to so many per batch, launching kernels takes longer than running them: CUDA graphs
WARMUP_STEPS = 3  # the first compiles, the second records the CUDA graphs, the third replays them

ForwardCall = Callable[[Tensor], Tensor]


def is_worth_compiling(steps_left: int, seconds_per_step: float) -> bool:
    """Whether the time that compiling is supposed to save is more than what it takes.

    Example:
        >>> is_worth_compiling(100, 0.1), is_worth_compiling(100_000, 0.1)
        (False, True)
    """
    return steps_left * seconds_per_step * EXPECTED_SAVING > COMPILE_SECONDS


def reads_only_logits(distiller: Distiller) -> bool:
    """Whether nothing but the student's logits is read: hooks inside a compiled network would not be called."""
    reader = distiller.shown.reader
    return reader.request == FeatureRequest() and not reader.request_before.stages


class StudentCompiler:
    """Decides epoch by epoch; ``with compiling.epoch(...)`` around the training part, ``begin`` at its first batch.

    "auto" trains the first epoch as it is, and compiles for the second if that pays by the time that the first took.
    If a compiled epoch then turns out slower, it goes back.

    Args:
        distiller: whose student's calls are compiled.
        optimizer: one that runs backward twice in a step cannot be served.
        settings: ``compile`` and ``gradient_accumulation_steps``.
        compute: "auto" compiles on CUDA alone.
        observer: is told when something is compiled, and when it could not be.
        compile: in place of ``torch.compile``.
        clock: in seconds.
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
        asked = settings.compile is True or (settings.compile == "auto" and compute.device.type == "cuda")
        own = "forward" not in vars(self.student)
        fits = (
            own
            and reads_only_logits(distiller)
            and not isinstance(optimizer, SplitGradientOptimizer)
            and not settings.qat_fraction
        )
        self.wanted = asked and fits
        if settings.compile is True and not fits:
            observer.note("not compiled: the method reads more than logits, int8 is simulated, or backward runs twice")
        self.twice = distiller.method.needs.second != "none"
        self.call: ForwardCall | None = None
        self.whole = torch.Size()  # shape of the batches that the compiled call is for
        self.plain_epochs: list[float] = []  # seconds per step
        self.compiled_epochs: list[float] = []
        self._left = 0

    @contextmanager
    def epoch(self, steps: int, left: int) -> Iterator[None]:
        """The training part of an epoch of so many steps; with it, ``left`` steps are left until the end."""
        self._left, started = left, self.clock()
        try:
            yield
        finally:
            compiled = vars(self.student).pop("forward", None) is not None
        seconds = (self.clock() - started) / max(steps, 1)
        (self.compiled_epochs if compiled else self.plain_epochs).append(seconds)
        self._compare()

    def begin(self, images: Tensor) -> None:
        """The epoch's first batch: compile for batches of this shape, where that is wanted and pays."""
        if not self.wanted:
            return
        if self.call is None:
            if self.settings.compile == "auto" and not (
                self.plain_epochs and is_worth_compiling(self._left, statistics.median(self.plain_epochs))
            ):
                return
            self._compile(images)
        if self.call is not None:
            self._install(self.call)

    def _install(self, call: ForwardCall) -> None:
        """Until the epoch's end, the student's own ``forward`` stands back where a batch is whole."""
        plain: ForwardCall = self.student.forward
        graphs = self._graphs

        def forward(images: Tensor) -> Tensor:
            if images.shape != self.whole or not torch.is_grad_enabled() or not self.student.training:
                return plain(images)
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return call(images)

        self.student.forward = forward

    @property
    def _graphs(self) -> bool:
        """CUDA graphs write each result over the last one: nothing may be kept from one call to the next."""
        few = len(self.whole) > 0 and self.whole[0] <= MAX_CUDA_GRAPH_IMAGES
        return (
            self.compute.device.type == "cuda"
            and few
            and self.settings.gradient_accumulation_steps == 1
            and not self.twice
        )

    def _compile(self, images: Tensor) -> None:
        self.whole = images.shape
        mode = {"mode": "reduce-overhead"} if self._graphs else {}
        started = self.clock()
        call = self.compile(self.student.forward, dynamic=False, **mode)
        try:
            self._rehearse(call, images)
        except Exception as error:  # whatever a compiler may throw: training goes on without it
            self.wanted = False
            reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
            self.observer.note(f"not compiled: {reason}")
            return
        self.call = call
        how = " with CUDA graphs" if self._graphs else ""
        self.observer.note(f"the student's forward pass is compiled{how}: {self.clock() - started:.0f} s")

    def _rehearse(self, call: ForwardCall, images: Tensor) -> None:
        """Forward and backward on a batch, so that all is compiled now; BatchNorm and random state are put back."""
        images = images.contiguous(memory_format=self.compute.memory_format)
        kept = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        devices = [self.compute.device] if self.compute.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                for _ in range(WARMUP_STEPS):
                    if self._graphs:
                        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                    with self.compute.autocast():
                        logits = call(images)
                    logits.float().logsumexp(dim=1).sum().backward()  # type: ignore[no-untyped-call]
                    self.student.zero_grad(set_to_none=True)
        finally:
            self.student.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    def _compare(self) -> None:
        """The first compiled epoch includes compiling; from the second on, it must be faster than plain ones were."""
        if self.settings.compile != "auto" or self.call is None or len(self.compiled_epochs) < 2:
            return
        compiled, plain = statistics.median(self.compiled_epochs[1:]), statistics.median(self.plain_epochs)
        if compiled >= plain:
            self.call, self.wanted = None, False
            self.observer.note(
                f"no longer compiled: a step took {compiled:.3g} s, and {plain:.3g} s before it was compiled"
            )
