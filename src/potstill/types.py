"""The values that pass between modules.

Shape letters: B batch, K classes, C H W channels, height and width of a feature map, D embedding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """What a method may know of a batch besides the networks' outputs."""

    images: Tensor  # [B, 3, H, W], normalised for the student
    labels: Tensor  # [B], int64 class ids
    index: Tensor | None = None  # [B], int64 sample ids: positions in the training set
    view: Tensor | None = None  # [B], int64 view numbers: which augmented version of the sample this is

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Outputs:
    """What one network said about a batch."""

    logits: Tensor  # [B, K], before softmax
    features: dict[str, Tensor] = field(default_factory=dict)  # tap path -> [B, C, H, W] or [B, D]


@dataclass
class Step:
    """One forward pass of a Distiller: the student's logits and the weighted terms whose sum is minimised."""

    logits: Tensor  # [B, K]
    terms: dict[str, Tensor]  # name -> scalar

    @property
    def loss(self) -> Tensor:
        """The sum of the terms, a scalar."""
        return torch.stack(list(self.terms.values())).sum()
