"""Means of the loss terms over an epoch, without a synchronisation per step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.errors import NonFiniteError


class TermAverages:
    """Keeps every step's terms on the device and reads them once, at the end of the epoch.

    A term that a step lacks (a last image alone has no relation to others) is averaged over the other steps.
    """

    def __init__(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._steps: list[Tensor] = []
        self._sizes: list[int] = []

    def update(self, terms: dict[str, Tensor], images: int) -> None:
        """Note one step's terms (scalars) over so many images."""
        self._names.append(tuple(terms))
        self._steps.append(torch.stack([term.detach().float() for term in terms.values()]))
        self._sizes.append(images)

    def pack(self) -> tuple[dict[str, Tensor], list[Any]]:
        """All that was noted: tensors by name, and what JSON can hold."""
        values = {"terms": torch.cat(self._steps)} if self._steps else {}
        return values, [[list(names), size] for names, size in zip(self._names, self._sizes, strict=True)]

    def unpack(self, tensors: Mapping[str, Tensor], facts: Sequence[Any]) -> None:
        """Put what ``pack`` gave in place of one's own."""
        self._names = [tuple(names) for names, _ in facts]
        self._sizes = [int(size) for _, size in facts]
        lengths = [len(names) for names in self._names]
        self._steps = list(tensors["terms"].split(lengths)) if lengths else []  # type: ignore[no-untyped-call]

    def compute(self, where: str) -> dict[str, float]:
        """Means by term, weighted by the images of each step.

        Raises:
            NonFiniteError: some step's term was NaN or infinite; names the first such step (from 1) and the terms.
        """
        known = list(dict.fromkeys(name for names in self._names for name in names))
        values = iter(torch.cat(self._steps).cpu().tolist())  # the one place where the device is waited for
        sums, weights = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
        for step, (names, size) in enumerate(zip(self._names, self._sizes, strict=True), start=1):
            found = dict(zip(names, values, strict=False))  # takes as many values as there are names
            bad = [name for name, value in found.items() if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(
                    f"{where}: at step {step} the loss term {', '.join(bad)} is {sum(found.values()):g}.\n"
                    "Lower the learning rate (training.lr), or set training.clip_norm=1; the last checkpoint is finite"
                )
            for name, value in found.items():
                sums[name] += size * value
                weights[name] += size
        return {name: sums[name] / weights[name] for name in known}
