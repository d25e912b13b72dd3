"""Choose the number of CPU threads of a run and the precision of each network by timing a training step, and find out
before the first epoch whether a batch fits into the memory of a GPU.

Two threads are 1.1 to 2 times as fast as one on idle cores and several times slower on busy ones, since each waits for
the other at every layer.  bf16 halves the time of most networks, but networks of depthwise convolutions take 1.5 times
as long in it.  Only a measurement shows which case applies.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from potstill.data.concurrency import usable_cores
from potstill.distillation.distiller import Distiller
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import StorageError
from potstill.formatting import format_scaled
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.types import Batch

MIN_SPEEDUP = 1.1  # over the first candidate; less may be noise
MIN_ROUNDS, MAX_ROUNDS = 3, 5
TARGET_SECONDS, MAX_SECONDS = 0.2, 4.0  # no further round begins after this time: past MIN_ROUNDS; at all
TIMED_PIXELS = 16 * 64 * 64  # of the timed batch: enough to keep several cores busy, quick on one
MAX_TIMING_SHARE = 0.02  # of the images that a training processes
MIN_PRECISION_ROUNDS, MIN_PRECISION_IMAGES = 2, 16  # with fewer, timing is too noisy
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class ThreadChoice:
    """A number of threads and the timings behind it."""

    threads: int
    seconds: dict[int, float] = field(default_factory=dict)  # median of a step by number of threads; empty: not timed

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for environment.json."""
        timed = {str(threads): round(seconds, 6) for threads, seconds in sorted(self.seconds.items())}
        return {"threads": self.threads, "calibration": timed}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "ThreadChoice | None":
        """Invert ``to_dict``; None if ``facts`` hold no such choice."""
        threads, timed = facts.get("threads"), facts.get("calibration")
        if not isinstance(threads, int) or not isinstance(timed, dict):
            return None
        return cls(threads, {int(number): float(seconds) for number, seconds in timed.items()})

    def __str__(self) -> str:
        text = f"{self.threads} CPU thread{'' if self.threads == 1 else 's'}"
        others = [f"{seconds:.3g} s with {count}" for count, seconds in self.seconds.items() if count != self.threads]
        if not others:
            return text
        return f"{text}: a step on a small batch takes {self.seconds[self.threads]:.3g} s, {', '.join(others)}"


def select_fastest(
    step: Callable[[], object],
    candidates: Sequence[Candidate],
    *,
    apply: Callable[[Candidate], None],
    clock: Callable[[], float] = time.perf_counter,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[Candidate, dict[Candidate, float]]:
    """Time ``step`` under each candidate in turn, round by round, and apply the fastest.

    The first candidate is kept unless another is clearly faster, by the median over rounds of the ratio within the
    round, so that a slow moment affects both.  Return the one in effect, and the median seconds of a step by candidate.
    """
    preferred, kept = candidates[0], candidates[0]
    rounds: list[dict[Candidate, float]] = []

    def timed(candidate: Candidate) -> float:
        apply(candidate)
        started = clock()
        step()
        return clock() - started

    try:
        if len(candidates) > 1:
            for candidate in candidates:  # the first step of each prepares kernels and memory
                timed(candidate)
            started = clock()
            while not rounds or (
                len(rounds) < max_rounds
                and clock() - started < (MAX_SECONDS if len(rounds) < MIN_ROUNDS else TARGET_SECONDS)
            ):
                rounds.append({candidate: timed(candidate) for candidate in candidates})
            speedups = {each: statistics.median(row[preferred] / row[each] for row in rounds) for each in candidates}
            best = max(candidates, key=lambda each: speedups[each])
            kept = best if speedups[best] >= MIN_SPEEDUP else preferred
    finally:
        apply(kept)
    return kept, {each: statistics.median(row[each] for row in rounds) for each in candidates} if rounds else {}


def create_timed_step(
    student: nn.Module,
    size: int,
    images: int,
    compute: Compute,
    *,
    autocast: Callable[[], AbstractContextManager[object]] | None = None,
) -> Callable[[], None]:
    """Return a forward and backward pass of a copy of ``student`` on noise, without side effects."""
    compute = compute.for_training(student)
    network = copy.deepcopy(student).train().to(compute.device, memory_format=compute.memory_format)  # type: ignore[call-overload]
    count = timed_batch_size(images, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, size, size, generator=generator).to(compute.device)
    noise = noise.contiguous(memory_format=compute.memory_format)

    def step() -> None:
        # Dropout draws from the global generator.
        with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
            with (autocast or compute.autocast)():
                logits = network(noise)
            logits.float().logsumexp(dim=1).sum().backward()
            network.zero_grad(set_to_none=True)
        compute.synchronize()

    return step


def timed_batch_size(images: int, size: int) -> int:
    """Return the number of images in the batch of ``create_timed_step``.

    Example:
        >>> timed_batch_size(128, 64), timed_batch_size(8, 64), timed_batch_size(128, 512)
        (16, 8, 2)
    """
    return max(2, min(images, TIMED_PIXELS // size**2))  # BatchNorm needs two


class ThreadSelector:
    """Chooses the number of threads at a run's first training; a context manager around the run that restores it.

    All trainings of a run use the same number, so that baseline and distilled differ in nothing else, a resumed run the
    ``recorded`` one (another would round sums differently), processes on one machine that of the first.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any] | None = None,
        on_choice: Callable[[dict[str, Any]], None] | None = None,
        *,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.processes = processes
        self.original_threads, self.on_choice, self.reported = torch.get_num_threads(), on_choice, False
        choice = ThreadChoice.from_dict(recorded or {})
        # Out of range if the run has moved to another machine.
        valid = choice is not None and 1 <= choice.threads <= max(self.original_threads, usable_cores())
        self.choice = choice if valid else None

    def select(
        self,
        student: nn.Module,
        size: int,
        settings: TrainingSettings,
        compute: Compute,
        *,
        workers: int = 0,
        observer: Observer | None = None,
    ) -> None:
        """Set the number of threads before a training; time a step, on a CPU, if it is the run's first one."""
        if settings.threads != "auto":
            torch.set_num_threads(settings.threads)
            return
        if self.choice is None:
            cores = max(1, min(self.original_threads, usable_cores() // self.processes.local_count - workers))
            if cores > 1 and compute.device.type == "cpu":
                step = create_timed_step(student, size, settings.batch_size, compute)
                self.choice = ThreadChoice(*select_fastest(step, [cores, 1], apply=torch.set_num_threads))
                if observer is not None:
                    observer.note(str(self.choice))
            else:
                self.choice = ThreadChoice(cores)
            self.choice = self.processes.share(self.choice)
        torch.set_num_threads(self.choice.threads)
        if not self.reported and self.on_choice is not None:
            self.on_choice(self.facts)
        self.reported = True

    @property
    def facts(self) -> dict[str, Any]:
        """The facts for environment.json; empty before the choice."""
        return {} if self.choice is None else self.choice.to_dict()

    def __enter__(self) -> "ThreadSelector":
        if self.choice is not None:  # a resumed run, which may have only evaluation left
            torch.set_num_threads(self.choice.threads)
        return self

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self.original_threads)


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a network's training and the timings behind it."""

    name: str  # "bf16", "fp16" or "float32"
    seconds: dict[str, float] = field(default_factory=dict)  # median of a step by precision; empty: not timed


class PrecisionSelector:
    """Chooses the precision at the first training of each network.

    Baseline, distilled and the students of further seeds are one network and share its precision; a resumed or
    reproduced run uses the ``recorded`` one, processes that of the first.  If timing would cost more than 2 % of the
    training, the architecture decides: float32 with depthwise convolutions, else bf16.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any] | None = None,
        on_choice: Callable[[dict[str, Any]], None] | None = None,
        *,
        processes: ProcessGroup = SINGLE_PROCESS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.processes, self.on_choice, self.clock = processes, on_choice, clock
        self.choices = _parse_precisions(recorded or {})

    def select(
        self,
        network: nn.Module,
        name: str,
        size: int,
        settings: TrainingSettings,
        compute: Compute,
        *,
        images: int,
        observer: Observer | None = None,
    ) -> Compute:
        """Return ``compute`` with the precision for a training of ``network``; as it is without fast bf16."""
        half = compute.precision
        if settings.precision != "auto" or half == "float32":
            return compute
        key = f"{name} at {size} px"
        if key not in self.choices:
            self.choices[key] = choice = self.processes.share(self._measure(network, size, settings, compute, images))
            if observer is not None and choice.seconds:
                other = "float32" if choice.name == half else half
                observer.note(
                    f"{key} trains in {choice.name}: a step on a small batch takes "
                    f"{choice.seconds[choice.name]:.3g} s, {choice.seconds[other]:.3g} s in {other}"
                )
            if self.on_choice is not None:
                self.on_choice(self.facts)
        # A run that has moved to other hardware may have recorded the half precision of the earlier one.
        chosen = "float32" if self.choices[key].name == "float32" else half
        return replace(compute, bf16=chosen == "bf16", fp16=chosen == "fp16", fast_bf16=compute.bf16)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts for environment.json; empty before the first choice."""
        if not self.choices:
            return {}
        precisions = {
            key: {
                "precision": choice.name,
                "calibration": {name: round(seconds, 6) for name, seconds in sorted(choice.seconds.items())},
            }
            for key, choice in sorted(self.choices.items())
        }
        names = sorted({choice.name for choice in self.choices.values()})
        return {"precision": ", ".join(names), "precisions": precisions}

    def _measure(
        self, network: nn.Module, size: int, settings: TrainingSettings, compute: Compute, images: int
    ) -> PrecisionChoice:
        # Each round, the warm-up included, takes a step in both precisions.
        budget = MAX_TIMING_SHARE * images * settings.epochs / 2
        batch = min(timed_batch_size(settings.batch_size, size), int(budget / (MIN_PRECISION_ROUNDS + 1)))
        if batch < min(MIN_PRECISION_IMAGES, timed_batch_size(settings.batch_size, size)):
            return PrecisionChoice("float32" if has_depthwise(network) else compute.precision)
        tried = compute

        def apply(name: str) -> None:
            nonlocal tried
            tried = replace(compute, bf16=False, fp16=False) if name == "float32" else compute

        step = create_timed_step(network, size, batch, compute, autocast=lambda: tried.autocast())
        rounds = min(MAX_ROUNDS, int(budget / batch) - 1)
        return PrecisionChoice(
            *select_fastest(step, [compute.precision, "float32"], apply=apply, clock=self.clock, max_rounds=rounds)
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports too little memory, on a GPU or the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def largest_fitting_batch(attempt: Callable[[int], None], batch: int) -> int:
    """Return the largest batch that an attempt does not run out of memory with, in eighths of ``batch``; 0: none.

    Example:
        >>> def attempt(images):
        ...     if images > 100:
        ...         raise torch.OutOfMemoryError
        >>> largest_fitting_batch(attempt, 256), largest_fitting_batch(attempt, 4096)
        (96, 64)
    """
    eighths = [batch * share // 8 for share in range(7, 0, -1)]
    halves = [batch >> power for power in range(4, batch.bit_length())]
    for smaller in dict.fromkeys(each for each in (*eighths, *halves) if 0 < each < batch):
        try:
            attempt(smaller)
            return smaller
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    return 0


class BatchTrial:
    """Training steps on zeros like ``batch``, whose outcome changes nothing."""

    def __init__(
        self, distiller: Distiller, batch: Batch, compute: Compute, *, stage: str, state_bytes: int, epochs: int = 1
    ) -> None:
        self.distiller, self.batch, self.compute = distiller, batch, compute
        self.stage, self.state_bytes, self.epochs, self.part = stage, state_bytes, epochs, ""

    def run(self) -> None:
        """Try the true size; StorageError names the part of the step, the memory, and the largest batch that fits."""
        wanted = len(self.batch)
        try:
            self.attempt(wanted)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason, part = str(error).strip().splitlines(), self.part
        largest = largest_fitting_batch(self.attempt, wanted)
        count = self.compute.processes.count
        several = f" in each of {count} processes" if count > 1 else ""
        fits = f"{largest}{several} fits" if largest else "not even one image fits"
        advice = (
            f"set training.batch_size={largest * count}"
            + (f", or accumulate: training.gradient_accumulation_steps={-(-wanted // largest)}" if largest > 1 else "")
            if largest
            else "take smaller images (data.size) or a smaller network"
        )
        raise StorageError(
            f"{self.stage}: out of memory at batch {wanted}{several}, in the {part}: {fits}. {self._memory()}"
            f"{' ' + reason[0] if reason else ''}\nTo go on, {advice}"
        )

    def attempt(self, images: int) -> None:
        """Run teacher, student and backward pass on so many images."""
        device = self.compute.device
        weights = {name for name, _ in self.distiller.named_parameters()}  # which no step changes here
        state = {
            name: value.clone() if isinstance(value, Tensor) and name not in weights else value
            for name, value in self.distiller.state_dict().items()
        }
        scaling, self.distiller.scaling = self.distiller.scaling, None  # it exchanges with other processes
        mode = self.distiller.training
        self.part = "optimizer's state"
        try:
            ballast = torch.empty(self.state_bytes, dtype=torch.uint8, device=device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                if self.distiller.method.epoch is None:  # else a resumed epoch has begun
                    self.distiller.method.start_epoch(0, self.epochs)
                self.distiller.train()
                self._step(images)
            self.compute.synchronize()
            del ballast
        finally:
            self.distiller.zero_grad(set_to_none=True)
            self.distiller.scaling = scaling
            self.distiller.train(mode)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            self.distiller.load_state_dict(state)

    def _step(self, images: int) -> None:
        first: list[Any] = [each if each is None else each[:images] for each in vars(self.batch).values()]
        batch = Batch(*first)
        self.part = "teacher's forward pass"
        with self.compute.autocast():
            teacher = self.distiller.run_teacher(batch.images, batch.second, index=batch.index)
            self.part = "student's forward pass"
            step = self.distiller(**vars(batch), teacher=teacher)
        self.part = "backward pass"
        step.loss.backward()

    def _memory(self) -> str:
        if self.compute.device.type != "cuda":
            return ""
        free, total = torch.cuda.mem_get_info(self.compute.device)
        return f"The GPU has {format_scaled(total, 'B')}, of which {format_scaled(free, 'B')} are free."


def has_depthwise(network: nn.Module) -> bool:
    """Return whether the network has a depthwise convolution.

    Example:
        >>> has_depthwise(nn.Conv2d(8, 8, 3, groups=8)), has_depthwise(nn.Conv2d(8, 8, 3))
        (True, False)
    """
    return any(
        isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
        for module in network.modules()
    )


def _parse_precisions(facts: Mapping[str, Any]) -> dict[str, PrecisionChoice]:
    """Invert ``PrecisionSelector.facts``; malformed entries are left out."""
    choices: dict[str, PrecisionChoice] = {}
    precisions = facts.get("precisions")
    for key, value in precisions.items() if isinstance(precisions, Mapping) else ():
        if isinstance(value, Mapping) and value.get("precision") in ("bf16", "fp16", "float32"):
            timed = value.get("calibration")
            seconds = {str(name): float(each) for name, each in timed.items()} if isinstance(timed, Mapping) else {}
            choices[str(key)] = PrecisionChoice(str(value["precision"]), seconds)
    return choices
