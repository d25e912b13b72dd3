"""Means of the loss terms over an epoch, without a synchronisation per step."""

import torch
from torch import Tensor

from potstill.errors import NonFiniteError


class TermAverages:
    """Keeps every step's terms on the device and reads them once, at the end of the epoch."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._steps: list[Tensor] = []
        self._sizes: list[int] = []

    def update(self, terms: dict[str, Tensor], images: int) -> None:
        """Note one step's terms (scalars) over so many images."""
        self._names = list(terms)
        self._steps.append(torch.stack([term.detach().float() for term in terms.values()]))
        self._sizes.append(images)

    def compute(self, where: str) -> dict[str, float]:
        """Means by term, weighted by the images of each step.

        Raises:
            NonFiniteError: some step's term was NaN or infinite; names the first such step (from 1) and the terms.
        """
        values = torch.stack(self._steps).cpu().double()  # [steps, terms]
        if not values.isfinite().all():
            step = int((~values.isfinite()).any(dim=1).nonzero()[0])
            bad = [name for name, value in zip(self._names, values[step], strict=True) if not value.isfinite()]
            raise NonFiniteError(
                f"{where}: at step {step + 1} the loss term {', '.join(bad)} is {values[step].sum().item():g}.\n"
                "Lower the learning rate (training.lr), or set training.clip_norm=1; the last checkpoint is finite"
            )
        weights = torch.tensor(self._sizes, dtype=torch.float64)
        means = (values * weights[:, None]).sum(dim=0) / weights.sum()
        return dict(zip(self._names, means.tolist(), strict=True))
