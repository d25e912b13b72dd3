"""The number of CPU threads of a run and the precision of each network, chosen by timing a training step.

Two threads are 1.1 to 2 times as fast as one on idle cores, and several times slower than one beside a busy neighbour,
since each waits for the other at every layer.  Networks of depthwise convolutions take 1.5 times as long in bf16, in
which others take half as long.  Only a measurement shows which case applies.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings

MIN_SPEEDUP = 1.1  # times faster than the first candidate: less may be chance
MAX_ROUNDS, MIN_ROUNDS = 5, 3
TARGET_SECONDS, MAX_SECONDS = 0.2, 4.0  # after which no further round begins: past the fewest rounds; at all
Candidate = TypeVar("Candidate")
TIMED_PIXELS = 16 * 64 * 64  # of the batch that is timed: enough to keep several cores busy, soon over on one


@dataclass(frozen=True)
class ThreadChoice:
    """The number of threads, and what it was chosen by."""

    threads: int
    seconds: dict[int, float] = field(default_factory=dict)  # median of a step by number of threads; empty: not timed

    def record(self) -> dict[str, Any]:
        """Facts for environment.json."""
        timed = {str(threads): round(seconds, 6) for threads, seconds in sorted(self.seconds.items())}
        return {"threads": self.threads, "calibration": timed}

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> "ThreadChoice | None":
        """What ``record`` told; None where these facts say nothing of it."""
        threads, timed = facts.get("threads"), facts.get("calibration")
        if not isinstance(threads, int) or not isinstance(timed, dict):
            return None
        return cls(threads, {int(number): float(seconds) for number, seconds in timed.items()})

    def __str__(self) -> str:
        words = f"{self.threads} CPU thread{'' if self.threads == 1 else 's'}"
        others = [
            f"{seconds:.3g} s with {threads}" for threads, seconds in self.seconds.items() if threads != self.threads
        ]
        if not others:
            return words
        return f"{words}: a step on a small batch takes {self.seconds[self.threads]:.3g} s, {', '.join(others)}"


def choose_threads(
    step: Callable[[], None],
    candidates: Sequence[int],
    *,
    set_threads: Callable[[int], None] = torch.set_num_threads,
    clock: Callable[[], float] = time.perf_counter,
) -> ThreadChoice:
    """Time ``step`` with each number of threads in turn, round by round, and set the number that is kept.

    The first candidate is kept unless another is clearly faster (by the median over rounds of the ratio within the
    round, so that a slow moment slows both).  With one candidate nothing is timed.

    Args:
        step: one training step that leaves no trace.
        candidates: numbers of threads, the preferred one first.
        set_threads: sets the process's number of threads.
        clock: in seconds.
    """
    return ThreadChoice(*select_fastest(step, candidates, choose=set_threads, clock=clock))


def select_fastest(
    step: Callable[[], None],
    candidates: Sequence[Candidate],
    *,
    choose: Callable[[Candidate], None],
    clock: Callable[[], float] = time.perf_counter,
    most: int = MAX_ROUNDS,
) -> tuple[Candidate, dict[Candidate, float]]:
    """What ``choose_threads`` does, for anything that ``choose`` puts in force.

    Args:
        step: see ``choose_threads``.
        candidates: the preferred one first.
        choose: puts a candidate in force; the one that is kept stays so.
        clock: in seconds.
        most: rounds.

    Returns:
        The candidate that is kept, and the median of a step in seconds by candidate; empty where nothing was timed.
    """
    preferred, kept = candidates[0], candidates[0]
    rounds: list[dict[Candidate, float]] = []

    def timed(candidate: Candidate) -> float:
        choose(candidate)
        started = clock()
        step()
        return clock() - started

    try:
        if len(candidates) > 1:
            for candidate in candidates:  # the first step of each prepares kernels and memory
                timed(candidate)
            started = clock()
            while not rounds or (
                len(rounds) < most and clock() - started < (MAX_SECONDS if len(rounds) < MIN_ROUNDS else TARGET_SECONDS)
            ):
                rounds.append({candidate: timed(candidate) for candidate in candidates})
            gains = {each: statistics.median(row[preferred] / row[each] for row in rounds) for each in candidates}
            best = max(candidates, key=lambda each: gains[each])
            kept = best if gains[best] >= MIN_SPEEDUP else preferred
    finally:
        choose(kept)
    return kept, {each: statistics.median(row[each] for row in rounds) for each in candidates} if rounds else {}


def create_timed_step(
    student: nn.Module,
    size: int,
    images: int,
    compute: Compute,
    *,
    autocast: Callable[[], AbstractContextManager[object]] | None = None,
) -> Callable[[], None]:
    """Forward and backward of a copy of ``student`` on noise; leaves the student and the random state as they are.

    Args:
        student: gives logits [B, K] for images [B, 3, size, size].
        size: height and width in pixels.
        images: of a batch; fewer are taken where they are large.
        compute: device, precision and memory layout.
        autocast: in place of the precision of ``compute``.
    """
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
        compute.wait()

    return step


def timed_batch_size(images: int, size: int) -> int:
    """How many images ``create_timed_step`` has in its batch.

    Example:
        >>> timed_batch_size(128, 64), timed_batch_size(8, 64), timed_batch_size(128, 512)
        (16, 8, 2)
    """
    return max(2, min(images, TIMED_PIXELS // size**2))  # BatchNorm needs two


_CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, and the period


class ThreadSelector:
    """Found at the run's first training, kept by all that follow, put back at its end.

    All trainings of a run compute with one number of threads, so that baseline and distilled differ in nothing else.  A
    resumed run takes the number that its first process found: with another, sums would be rounded otherwise.  Use as a
    context manager around the run.

    Args:
        recorded: environment.json of an earlier process of this run.
        keep: receives the facts for environment.json as soon as they are known.
        processes: those of one machine share its cores; all compute with the number that the first one finds.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
        *,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.processes = processes
        self.before, self.keep, self.settled = torch.get_num_threads(), keep, False
        known = ThreadChoice.recorded(recorded or {})
        # More than there can be: the run has come to another machine.
        fits = known is not None and 1 <= known.threads <= max(self.before, usable_cores())
        self.found = known if fits else None

    def settle(
        self,
        student: nn.Module,
        size: int,
        settings: TrainingSettings,
        compute: Compute,
        *,
        workers: int = 0,
        observer: Observer | None = None,
    ) -> None:
        """Set the threads for a training that is about to begin; the run's first one is timed.

        Args:
            student: as it will be trained; a copy of it is timed.
            size: of its images, in pixels.
            settings: an explicit ``threads`` is taken as it is.
            compute: only a CPU is timed.
            workers: processes that decode meanwhile; they need cores too.
            observer: is told what was found.
        """
        if settings.threads != "auto":
            torch.set_num_threads(settings.threads)
            return
        if self.found is None:
            most = max(1, min(self.before, usable_cores() // self.processes.local_count - workers))
            if most > 1 and compute.device.type == "cpu":
                step = create_timed_step(student, size, settings.batch_size, compute)
                self.found = choose_threads(step, [most, 1])
                if observer is not None:
                    observer.note(str(self.found))
            else:
                self.found = ThreadChoice(most)
            self.found = self.processes.share(self.found)
        torch.set_num_threads(self.found.threads)
        if not self.settled and self.keep is not None:
            self.keep(self.facts)
        self.settled = True

    @property
    def facts(self) -> dict[str, Any]:
        """For environment.json; nothing before a number has been found."""
        return {} if self.found is None else self.found.record()

    def __enter__(self) -> "ThreadSelector":
        if self.found is not None:  # of a run that goes on, and may have only evaluation left
            torch.set_num_threads(self.found.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self.before)


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, within a container's share of CPU time.

    Example:
        >>> usable_cores() >= 1
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA_FILE.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file; "max" in place of a number
        return cores


MAX_TIMING_SHARE = 0.02  # of a training's images: the most that timing may pass through the network
MIN_PRECISION_ROUNDS, MIN_PRECISION_IMAGES = 2, 16  # fewer say nothing


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a network's training, and what it was chosen by."""

    name: str  # "bf16" or "float32"
    seconds: dict[str, float] = field(default_factory=dict)  # median of a step by precision; empty: not timed


class PrecisionSelector:
    """Found at the first training of each network, kept by all that follow.

    Baseline and distilled are one network, so they have one precision; so have the students of further seeds.  A run
    that is resumed or reproduced takes what was recorded.

    Where timing would cost more than 2 % of the training, the network decides: float32 where it has depthwise
    convolutions, else bf16.

    Args:
        recorded: environment.json of an earlier process of this run, or of the run that is reproduced.
        keep: receives the facts for environment.json as soon as they are known.
        processes: all compute in the precision that the first one finds.
        clock: in seconds.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
        *,
        processes: ProcessGroup = SINGLE_PROCESS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.processes, self.keep, self.clock = processes, keep, clock
        self.found = _parse_precisions(recorded or {})

    def settle(
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
        """The compute of a training that is about to begin, with its precision.

        Args:
            network: as it will be trained; a copy of it is timed.
            name: of its architecture.
            size: of its images, in pixels.
            settings: an explicit ``precision`` is taken as it is.
            compute: as ``choose`` gave it; where the hardware has no fast bf16, it is returned as it is.
            images: of an epoch.
            observer: is told what was found.
        """
        if settings.precision != "auto" or not compute.bf16:
            return compute
        key = f"{name} at {size} px"
        if key not in self.found:
            found = self._measured(network, size, settings, compute, images)
            self.found[key] = found = self.processes.share(found)
            if observer is not None and found.seconds:
                other = "float32" if found.name == "bf16" else "bf16"
                observer.note(
                    f"{key} trains in {found.name}: a step on a small batch takes {found.seconds[found.name]:.3g} s, "
                    f"{found.seconds[other]:.3g} s in {other}"
                )
            if self.keep is not None:
                self.keep(self.facts)
        return replace(compute, bf16=self.found[key].name == "bf16", fast_bf16=True)

    @property
    def facts(self) -> dict[str, Any]:
        """For environment.json; nothing before a precision has been found."""
        if not self.found:
            return {}
        each = {
            key: {
                "precision": found.name,
                "calibration": {name: round(seconds, 6) for name, seconds in sorted(found.seconds.items())},
            }
            for key, found in sorted(self.found.items())
        }
        return {"precision": ", ".join(sorted({found.name for found in self.found.values()})), "precisions": each}

    def _measured(
        self, network: nn.Module, size: int, settings: TrainingSettings, compute: Compute, images: int
    ) -> PrecisionChoice:
        # Each round, and the one before that does not count, takes a step in either precision.
        allowed = MAX_TIMING_SHARE * images * settings.epochs / 2
        batch = min(timed_batch_size(settings.batch_size, size), int(allowed / (MIN_PRECISION_ROUNDS + 1)))
        if batch < min(MIN_PRECISION_IMAGES, timed_batch_size(settings.batch_size, size)):
            return PrecisionChoice("float32" if has_depthwise(network) else "bf16")
        current = {"name": "bf16"}

        def choose(name: str) -> None:
            current["name"] = name

        step = create_timed_step(
            network, size, batch, compute, autocast=lambda: replace(compute, bf16=current["name"] == "bf16").autocast()
        )
        rounds = min(MAX_ROUNDS, int(allowed / batch) - 1)
        return PrecisionChoice(*select_fastest(step, ["bf16", "float32"], choose=choose, clock=self.clock, most=rounds))


def has_depthwise(network: nn.Module) -> bool:
    """Whether any convolution treats each channel by itself.

    Example:
        >>> has_depthwise(nn.Conv2d(8, 8, 3, groups=8)), has_depthwise(nn.Conv2d(8, 8, 3))
        (True, False)
    """
    return any(
        isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
        for module in network.modules()
    )


def _parse_precisions(facts: Mapping[str, Any]) -> dict[str, PrecisionChoice]:
    """What ``PrecisionSelector.facts`` gave; what is of another form is left out."""
    found: dict[str, PrecisionChoice] = {}
    precisions = facts.get("precisions")
    for key, value in precisions.items() if isinstance(precisions, Mapping) else ():
        if isinstance(value, Mapping) and value.get("precision") in ("bf16", "float32"):
            timed = value.get("calibration")
            seconds = {str(name): float(each) for name, each in timed.items()} if isinstance(timed, Mapping) else {}
            found[str(key)] = PrecisionChoice(str(value["precision"]), seconds)
    return found
