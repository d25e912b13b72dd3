"""The state of training besides weights: the history of a stage, means of the loss terms, an unfinished epoch.

The means need no synchronisation with the device per step.
"""

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
    """Every epoch's figures and which was the best."""

    records: list[EpochRecord] = field(default_factory=list)  # lines of metrics.jsonl
    lines: list[str] = field(default_factory=list)  # the digest of each, as it was written
    best_epoch: int = 0  # from 1
    best_value: float = -float("inf")  # of the picking metric; losses are negated, so that larger is better
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Median over the epochs."""
        rates = sorted(record["images_per_second"] for record in self.records)
        return float(rates[len(rates) // 2])


_MAX_NAMED_IMAGES = 3  # images of a step that a message names


class TermAverages:
    """Keeps every step's terms on the device and reads them once, at the end of the epoch.

    A term that a step lacks (a last image alone has no relation to others) is averaged over the other steps.
    """

    def __init__(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._steps: list[Tensor] = []
        self._sizes: list[int] = []
        self._numbers: list[int] = []  # of the steps, from 1

    def update(self, terms: dict[str, Tensor], images: int, step: int | None = None) -> None:
        """Note one step's terms (scalars) over so many images.

        Args:
            terms: by name.
            images: that they are means over.
            step: its number, from 1; the next one where None.
        """
        self._names.append(tuple(terms))
        self._steps.append(torch.stack([term.detach().float() for term in terms.values()]))
        self._sizes.append(images)
        self._numbers.append(len(self._numbers) + 1 if step is None else step)

    def pack(self) -> tuple[dict[str, Tensor], list[Any]]:
        """All that was noted: tensors by name, and what JSON can hold."""
        values = {"terms": torch.cat(self._steps)} if self._steps else {}
        noted = zip(self._names, self._sizes, self._numbers, strict=True)
        return values, [[list(names), size, number] for names, size, number in noted]

    def unpack(self, tensors: Mapping[str, Tensor], facts: Sequence[Any]) -> None:
        """Put what ``pack`` gave in place of one's own."""
        self._names = [tuple(names) for names, _, _ in facts]
        self._sizes = [int(size) for _, size, _ in facts]
        self._numbers = [int(number) for _, _, number in facts]
        lengths = [len(names) for names in self._names]
        self._steps = list(tensors["terms"].split(lengths)) if lengths else []  # type: ignore[no-untyped-call]

    def join(self, packed: Sequence[tuple[Mapping[str, Tensor], Sequence[Any]]]) -> None:
        """Put what several processes noted, as they ``pack`` it, in place of one's own: step by step."""
        parts = [TermAverages() for _ in packed]
        for part, (tensors, facts) in zip(parts, packed, strict=True):
            part.unpack(tensors, facts)
        noted = [
            each for part in parts for each in zip(part._numbers, part._names, part._steps, part._sizes, strict=True)
        ]
        noted.sort(key=lambda each: each[0])  # of one step, in the order of the processes
        self._numbers = [number for number, _, _, _ in noted]
        self._names = [names for _, names, _, _ in noted]
        self._steps = [terms for _, _, terms, _ in noted]
        self._sizes = [size for _, _, _, size in noted]

    def compute(self, where: str, images: Callable[[int], Sequence[str]] | None = None) -> dict[str, float]:
        """Means by term, weighted by the images of each step.

        Args:
            where: for the message, what was averaged.
            images: the names of the images of a step, likewise.

        Raises:
            NonFiniteError: some step's term was NaN or infinite; names the first such step (from 1), terms, images.
        """
        known = list(dict.fromkeys(name for names in self._names for name in names))
        values = iter(torch.cat(self._steps).cpu().tolist())  # the one place where the device is waited for
        sums, weights = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
        for step, names, size in zip(self._numbers, self._names, self._sizes, strict=True):
            found = dict(zip(names, values, strict=False))  # takes as many values as there are names
            bad = [name for name, value in found.items() if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(
                    f"{where}: at step {step} the loss term {', '.join(bad)} is {sum(found.values()):g}"
                    f"{f', on {format_names(images(step), _MAX_NAMED_IMAGES)}' if images is not None else ''}.\n"
                    "Lower the learning rate (training.lr), or set training.max_grad_norm=1; the last "
                    "checkpoint is finite"
                )
            for name, value in found.items():
                sums[name] += size * value
                weights[name] += size
        return {name: sums[name] / weights[name] for name in known}


@dataclass
class EpochState:
    """How far an epoch has come, and its figures so far.

    Attributes:
        metrics, averages: of the steps that are done.
        lr: learning rate at its beginning.
        step: batches that are done.
    """

    metrics: StreamingMetrics
    averages: TermAverages
    lr: float
    step: int = 0
    _before: float = 0.0  # seconds, in an earlier process
    _began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """That the epoch has taken so far."""
        return self._before + time.perf_counter() - self._began

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and JSON facts."""
        tensors, terms = self.averages.pack()
        metrics = {f"metrics.{name}": value for name, value in self.metrics.pack().items()}
        return tensors | metrics, {"lr": self.lr, "step": self.step, "seconds": self.seconds, "terms": terms}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put packed figures in place of one's own."""
        self.averages.unpack(tensors, facts["terms"])
        self.metrics.unpack(
            {name.removeprefix("metrics."): value for name, value in tensors.items() if name.startswith("metrics.")}
        )
        self.lr, self.step = facts["lr"], facts["step"]
        self._before, self._began = facts["seconds"], time.perf_counter()
