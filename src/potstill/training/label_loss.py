"""Cross-entropy for batches in which perhaps no image has a label."""

import torch
from torch import Tensor, nn


class KnownLabels(nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` over the images with a label; 0 where a batch has none, where torch's own is NaN.

    Example:
        >>> loss = KnownLabels()
        >>> loss(torch.zeros(2, 4), torch.tensor([-100, -100])).item()
        0.0
        >>> round(loss(torch.zeros(2, 4), torch.tensor([3, -100])).item(), 4)  # log 4
        1.3863
    """

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(weight=weight, label_smoothing=label_smoothing, reduction="sum")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits [B, K] and labels [B], -100 where unknown -> a scalar."""
        known = target != self.ignore_index
        one = known.to(input.dtype) if self.weight is None else self.weight[target.clamp(min=0)] * known
        return super().forward(input, target) / one.sum().clamp(min=torch.finfo(input.dtype).tiny)
