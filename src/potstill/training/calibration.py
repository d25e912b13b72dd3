"""One thread or several, bf16 or float32: a training step is timed with each.

Two threads are 1.1 to 2 times as fast as one on idle cores, and several times slower than one beside a busy neighbour,
since each waits for the other at every layer.  Networks of depthwise convolutions take 1.5 times as long in bf16, in
which others take half as long.  Nothing but a clock tells which it is.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from potstill.training.devices import Compute

CLEARLY = 1.1  # times faster than the first candidate: less may be chance
ROUNDS, FEWEST = 5, 3
SECONDS, LONGEST = 0.2, 4.0  # after which no further round begins: past the fewest rounds; at all
Candidate = TypeVar("Candidate")
PIXELS = 16 * 64 * 64  # of the batch that is timed: enough to keep several cores busy, soon over on one


@dataclass(frozen=True)
class Calibration:
    """The number of threads, and what it was chosen by."""

    threads: int
    seconds: dict[int, float] = field(default_factory=dict)  # median of a step by number of threads; empty: not timed

    def record(self) -> dict[str, Any]:
        """Facts for environment.json."""
        timed = {str(threads): round(seconds, 6) for threads, seconds in sorted(self.seconds.items())}
        return {"threads": self.threads, "calibration": timed}

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> "Calibration | None":
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


def calibrate(
    step: Callable[[], None],
    candidates: Sequence[int],
    *,
    set_threads: Callable[[int], None] = torch.set_num_threads,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Time ``step`` with each number of threads in turn, round by round, and set the number that is kept.

    The first candidate is kept unless another is clearly faster (by the median over rounds of the ratio within the
    round, so that a slow moment slows both).  With one candidate nothing is timed.

    Args:
        step: one training step that leaves no trace.
        candidates: numbers of threads, the preferred one first.
        set_threads: sets the process's number of threads.
        clock: in seconds.
    """
    return Calibration(*fastest(step, candidates, choose=set_threads, clock=clock))


def fastest(
    step: Callable[[], None],
    candidates: Sequence[Candidate],
    *,
    choose: Callable[[Candidate], None],
    clock: Callable[[], float] = time.perf_counter,
    most: int = ROUNDS,
) -> tuple[Candidate, dict[Candidate, float]]:
    """What ``calibrate`` does, for anything that ``choose`` puts in force.

    Args:
        step: see ``calibrate``.
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
                len(rounds) < most and clock() - started < (LONGEST if len(rounds) < FEWEST else SECONDS)
            ):
                rounds.append({candidate: timed(candidate) for candidate in candidates})
            gains = {each: statistics.median(row[preferred] / row[each] for row in rounds) for each in candidates}
            best = max(candidates, key=lambda each: gains[each])
            kept = best if gains[best] >= CLEARLY else preferred
    finally:
        choose(kept)
    return kept, {each: statistics.median(row[each] for row in rounds) for each in candidates} if rounds else {}


def training_step(
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
    count = images_timed(images, size)
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


def images_timed(images: int, size: int) -> int:
    """How many images ``training_step`` has in its batch.

    Example:
        >>> images_timed(128, 64), images_timed(8, 64), images_timed(128, 512)
        (16, 8, 2)
    """
    return max(2, min(images, PIXELS // size**2))  # BatchNorm needs two
