"""From a step's terms to gradients, for optimizers that want them summed and for those that want them apart."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from potstill.types import Step


@runtime_checkable
class SplitsGradients(Protocol):
    """An optimizer that treats what labels say and what the teacher says differently."""

    def backward(self, labels: Tensor | None, distillation: Tensor | None) -> None:
        """Add the gradients of two scalars; None where there is none."""

    def clip(self, max_norm: float) -> None:
        """Bound the norm of both gradients together."""


class Gradients:
    """Adds up and clips the gradients of one optimizer's parameters."""

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.apart = optimizer if isinstance(optimizer, SplitsGradients) else None

    def add(self, step: Step, batches: int = 1, share: float = 1.0) -> None:
        """Add the gradients of the step's terms, as one of so many batches that are averaged.

        Args:
            step: of these images.
            batches: of one update.
            share: what they weigh among the processes that average their gradients; 1 where all have as many.
        """
        if self.apart is not None:
            labels, distillation = (None if part is None else part / batches for part in step.parts)
            self.apart.backward(labels, distillation)
        else:
            loss = step.loss if share == 1 else step.loss * share
            (loss / batches).backward()  # type: ignore[no-untyped-call]

    def clip(self, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most ``max_norm``."""
        if self.apart is not None:
            self.apart.clip(max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
