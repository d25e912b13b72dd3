"""The state of training besides weights: a stage's history, means of the loss terms, an unfinished epoch."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potstill.errors import NonFiniteError
from potstill.evaluation.metrics import StreamingMetrics
from potstill.formatting import format_names

EpochRecord = dict[str, Any]


@dataclass
class History:
    """The metrics of every epoch, and the best epoch."""

    records: list[EpochRecord] = field(default_factory=list)  # lines of metrics.jsonl
    lines: list[str] = field(default_factory=list)  # digest of each line
    best_epoch: int = 0  # from 1
    best_value: float = -float("inf")  # of the selection metric; losses are negated, so that larger is better
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Median training speed over the epochs."""
        rates = sorted(record["images_per_second"] for record in self.records)
        return float(rates[len(rates) // 2])


_MAX_NAMED_IMAGES = 3  # in an error message
NON_FINITE_HELP = (
    "Lower the learning rate (training.lr), or set training.max_grad_norm=1; the last checkpoint is finite"
)


class TermAverages:
    """Means of the loss terms over an epoch, kept on the device and read once, by ``compute``.

    A term that a step lacks (a single image has no relation to others) is averaged over the other steps.
    """

    def __init__(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._steps: list[Tensor] = []
        self._sizes: list[int] = []
        self._numbers: list[int] = []  # of the steps, from 1

    def update(self, terms: dict[str, Tensor], images: int, step: int | None = None) -> None:
        """Add one step's terms.

        Args:
            terms: scalars by name, means over the images.
            images: number of images.
            step: number of the step, from 1; None: the next one.
        """
        self._names.append(tuple(terms))
        self._steps.append(torch.stack([term.detach().float() for term in terms.values()]))
        self._sizes.append(images)
        self._numbers.append(len(self._numbers) + 1 if step is None else step)

    def pack(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Return the state as tensors by name and a JSON list."""
        tensors = {"terms": torch.cat(self._steps)} if self._steps else {}
        steps = zip(self._names, self._sizes, self._numbers, strict=True)
        return tensors, [[list(names), size, number] for names, size, number in steps]

    def unpack(self, tensors: Mapping[str, Tensor], facts: Sequence[Any]) -> None:
        """Replace the state by what ``pack`` returned."""
        self._names = [tuple(names) for names, _, _ in facts]
        self._sizes = [int(size) for _, size, _ in facts]
        self._numbers = [int(number) for _, _, number in facts]
        lengths = [len(names) for names in self._names]
        self._steps = list(tensors["terms"].split(lengths)) if lengths else []  # type: ignore[no-untyped-call]

    def merge(self, packed: Sequence[tuple[Mapping[str, Tensor], Sequence[Any]]]) -> None:
        """Replace the state by the steps of all processes, each given as its ``pack``, in order of their numbers."""
        parts = [TermAverages() for _ in packed]
        for part, (tensors, facts) in zip(parts, packed, strict=True):
            part.unpack(tensors, facts)
        steps = [
            each for part in parts for each in zip(part._numbers, part._names, part._steps, part._sizes, strict=True)
        ]
        steps.sort(key=lambda each: each[0])  # stable: within a step, in the order of the processes
        self._numbers = [number for number, _, _, _ in steps]
        self._names = [names for _, names, _, _ in steps]
        self._steps = [terms for _, _, terms, _ in steps]
        self._sizes = [size for _, _, _, size in steps]

    def compute(self, where: str, images: Callable[[int], Sequence[str]] | None = None) -> dict[str, float]:
        """Return the mean of each term, weighted by the images of each step.

        Args:
            where: names the epoch and split in an error message.
            images: returns the names of a step's images for an error message.

        Raises:
            NonFiniteError: a term was NaN or infinite; names the first such step (from 1), the terms and images.
        """
        known = list(dict.fromkeys(name for names in self._names for name in names))
        values = iter(torch.cat(self._steps).cpu().tolist())  # the only synchronisation with the device
        sums, weights = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
        for step, names, size in zip(self._numbers, self._names, self._sizes, strict=True):
            terms = dict(zip(names, values, strict=False))  # takes as many values as there are names
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(
                    f"{where}: at step {step} the loss term {', '.join(bad)} is {sum(terms.values()):g}"
                    f"{f', on {format_names(images(step), _MAX_NAMED_IMAGES)}' if images is not None else ''}.\n"
                    f"{NON_FINITE_HELP}"
                )
            for name, value in terms.items():
                sums[name] += size * value
                weights[name] += size
        return {name: sums[name] / weights[name] for name in known}


@dataclass
class EpochState:
    """The progress of an epoch.

    Attributes:
        metrics, averages: over the finished steps.
        lr: learning rate at the beginning of the epoch.
        step: number of finished batches.
    """

    metrics: StreamingMetrics
    averages: TermAverages
    lr: float
    step: int = 0
    _earlier_seconds: float = 0.0  # before the training was resumed
    _started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time that the epoch has taken so far."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name and JSON facts."""
        tensors, terms = self.averages.pack()
        metrics = {f"metrics.{name}": value for name, value in self.metrics.pack().items()}
        return tensors | metrics, {"lr": self.lr, "step": self.step, "seconds": self.seconds, "terms": terms}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state by what ``pack`` returned."""
        self.averages.unpack(tensors, facts["terms"])
        self.metrics.unpack(
            {name.removeprefix("metrics."): value for name, value in tensors.items() if name.startswith("metrics.")}
        )
        self.lr, self.step = facts["lr"], facts["step"]
        self._earlier_seconds, self._started = facts["seconds"], time.perf_counter()
