"""What a teacher says of each class on average, gathered in one epoch and used in the next."""

import torch
from torch import Tensor, nn


class ClassPrior(nn.Module):
    """One row of probabilities for each class: uniform at first, then the mean over the last epoch's images.

    Args:
        classes: K.

    Example:
        >>> prior = ClassPrior(2)
        >>> prior.add(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 0]))
        >>> prior.turn()
        >>> prior(torch.tensor([0, 1]))  # nobody has seen class 1, so its row stays
        tensor([[0.7000, 0.3000],
                [0.5000, 0.5000]])
    """

    rows: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.full((classes, classes), 1 / classes))
        self.register_buffer("sums", torch.zeros(classes, classes))
        self.register_buffer("counts", torch.zeros(classes))

    def forward(self, labels: Tensor) -> Tensor:
        """The rows of these classes: int64 [B] -> [B, K]."""
        return self.rows[labels]

    @torch.no_grad()
    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Gather a batch [B, K] for the next epoch."""
        self.sums.index_add_(0, labels, probabilities.to(self.sums.dtype))
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))

    @torch.no_grad()
    def turn(self) -> None:
        """Begin to use what was gathered, and to gather anew; a class that was not seen keeps its row."""
        seen = (self.counts > 0)[:, None]
        self.rows.copy_(torch.where(seen, self.sums / self.counts.clamp(min=1)[:, None], self.rows))
        self.sums.zero_()
        self.counts.zero_()
