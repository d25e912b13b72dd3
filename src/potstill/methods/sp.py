"""Similarity-preserving distillation: match the similarities between the images of a batch.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.  https://arxiv.org/abs/1907.09682
The rows of the similarity matrix have length 1, as in the paper, RepDistiller and mdistiller; torchdistill divides
by the sum of absolute values instead, which makes the loss 4 to 9 times smaller.
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import inner_products, require_two_images
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of two similarity matrices, divided by their size.

    .. math:: \frac{1}{B^2} \lVert \hat G_t - \hat G_s \rVert_F^2, \quad G = F F^\top, \quad
        \hat G_i = G_i / \lVert G_i \rVert_2

    Args:
        student: maps [B, C, H, W] or embeddings [B, D], flattened, not pooled.
        teacher: likewise; channels and sizes may differ.

    Raises:
        UsageError: a batch of one image, whose similarity to itself is always 1.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # nothing alike: rows (1, 0) and (0, 1)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # all alike: rows (0.7071, 0.7071)
        >>> sp_loss(student, teacher)  # by hand: 2 ((1 - 0.7071)^2 + 0.7071^2) / 4
        tensor(0.2929)
    """
    require_two_images(student, "sp")
    difference = _similarities(teacher.detach()) - _similarities(student)
    return difference.square().mean()


def _similarities(features: Tensor) -> Tensor:
    rows = at_least_float32(features).flatten(1)
    return F.normalize(inner_products(rows, rows), dim=1)


class SP(Method):
    """Labels plus similarities within the batch: ``CE + weight * SP`` on the maps of the last stage."""

    name = "sp"
    needs = Requirements(maps="last", several=True)

    weight: NonNegative = option(default=3000.0, doc="weight of the similarities")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"similarity": self.weight * sp_loss(student.maps[-1], teacher.maps[-1])}
