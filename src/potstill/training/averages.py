"""Means of the loss terms over an epoch, without a synchronisation per step."""

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

    def compute(self, where: str) -> dict[str, float]:
        """Means by term, weighted by the images of each step.

        Raises:
            NonFiniteError: some step's term was NaN or infinite; names the first such step (from 1) and the terms.
        """
        known = list(dict.fromkeys(name for names in self._names for name in names))
        values = torch.split(torch.cat(self._steps).cpu().double(), [len(names) for names in self._names])
        sums, weights = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
        for step, (names, found, size) in enumerate(zip(self._names, values, self._sizes, strict=True), start=1):
            if not found.isfinite().all():
                bad = [name for name, value in zip(names, found, strict=True) if not value.isfinite()]
                raise NonFiniteError(
                    f"{where}: at step {step} the loss term {', '.join(bad)} is {found.sum().item():g}.\n"
                    "Lower the learning rate (training.lr), or set training.clip_norm=1; the last checkpoint is finite"
                )
            for name, value in zip(names, found.tolist(), strict=True):
                sums[name] += size * value
                weights[name] += size
        return {name: sums[name] / weights[name] for name in known}
