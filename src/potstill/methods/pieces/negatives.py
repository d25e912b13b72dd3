"""Samples of other classes, drawn on the device of the batch from the labels of the whole training set."""

import math

import torch
from torch import Tensor, nn

from potstill.errors import UsageError


class ClassTable(nn.Module):
    """The training set sorted by class: each class is one run of places, everything else lies before or behind it.

    Args:
        labels: [N], int64, by sample id.

    Raises:
        UsageError: fewer than two classes: there is no sample of another class.
    """

    labels: Tensor
    order: Tensor  # sample ids by class
    counts: Tensor  # of each class
    starts: Tensor  # of each class's run in ``order``

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        counts = labels.bincount()
        present = counts[counts > 0]
        if len(present) < 2:
            raise UsageError(f"contrast needs samples of 2 classes or more, got {len(present)}; use kd instead")
        # Not in checkpoints: they follow from the training set.
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.smallest_pool = len(labels) - int(present.max())

    def draw_other(self, classes: Tensor, k: int) -> Tensor:
        """[B, k] sample ids, row i of other classes than ``classes[i]``, drawn with torch's global generator.

        No id comes twice in a row, unless all other classes together have fewer than ``k`` samples.
        """
        counts, starts = self._of(classes)
        pools = len(self.labels) - counts
        places = self._sparse(pools, k) if 2 * k < self.smallest_pool else self._dense(pools, k)
        places = places + counts * (places >= starts)  # step over the row's own class
        return self.order[places]

    def draw_same(self, classes: Tensor) -> Tensor:
        """[B] sample ids of the given classes."""
        counts, starts = self._of(classes)
        return self.order[(starts + _below(counts, 1)).squeeze(1)]

    def _of(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        return self.counts[classes].unsqueeze(1), self.starts[classes].unsqueeze(1)

    def _dense(self, pools: Tensor, k: int) -> Tensor:
        """By sorting one random key for each sample; where the pool is smaller than k, with repetition."""
        repeated = _below(pools, k)
        if k > len(self.labels):
            return repeated
        keys = torch.rand(len(pools), len(self.labels), device=pools.device)
        keys = keys.masked_fill(torch.arange(len(self.labels), device=pools.device) >= pools, 2)
        return torch.where(pools >= k, keys.argsort(dim=1)[:, :k], repeated)

    def _sparse(self, pools: Tensor, k: int) -> Tensor:
        """By drawing more than needed with repetition and keeping the first k that differ.

        Keys for all of a large training set would take B N numbers; this takes a little more than B k.
        """
        pool = self.smallest_pool
        expected = pool * -math.log1p(-k / pool)  # draws until k differ
        draws = _below(pools, math.ceil(expected + 8 * math.sqrt(expected) + 8))
        values, order = draws.sort(dim=1, stable=True)
        repeats = torch.zeros_like(draws, dtype=torch.bool)
        repeats[:, 1:] = values[:, 1:] == values[:, :-1]
        # Back in the order of drawing: keeping the k smallest would favour small places.
        late = torch.zeros_like(repeats).scatter_(1, order, repeats).to(torch.uint8)
        return draws.gather(1, late.argsort(dim=1, stable=True)[:, :k])


def _below(bounds: Tensor, count: int) -> Tensor:
    """[B, count] whole numbers, evenly from 0 to below each row's bound."""
    # Of so many numbers the remainders are even to 13 digits; a float32 times the bound would skip ids above 2^24.
    return torch.randint(2**62, (len(bounds), count), device=bounds.device) % bounds
