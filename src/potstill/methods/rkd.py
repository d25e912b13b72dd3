"""Relational knowledge distillation: match distances and angles between the embeddings of a batch.

Park, Kim, Lu and Cho, "Relational Knowledge Distillation", CVPR 2019.  https://arxiv.org/abs/1904.05068
The weights 25 and 50 and the pooled features are those of RepDistiller and mdistiller, where the published
classification numbers come from; the authors' metric learning has 1 and 2 on embeddings (``distance_weight=1``,
``angle_weight=2``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import inner_products, require_two_images
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def rkd_distance_loss(student: Tensor, teacher: Tensor, *, squared: bool = False, epsilon: Positive = 1e-12) -> Tensor:
    r"""Smooth L1 distance between the pairwise distances of student and teacher, each divided by its mean.

    .. math:: \frac{1}{B^2} \sum_{ij} \ell_1\Big(\frac{d^s_{ij}}{\bar d^s}, \frac{d^t_{ij}}{\bar d^t}\Big)

    The mean distance :math:`\bar d` is over pairs of different images; the mean of the loss is over all
    :math:`B^2` entries, the zeros of the diagonal among them.

    Args:
        student: embeddings or maps of B images, flattened to [B, D].
        teacher: likewise; the widths may differ.
        squared: compare squared distances.
        epsilon: squared distances are at least this, so that equal images have a gradient.

    Example:
        >>> student = torch.tensor([[0.0], [1.0], [2.0]])  # pairs 01, 02, 12: 1, 2, 1; by their mean 0.75, 1.5, 0.75
        >>> teacher = torch.tensor([[0.0], [1.0], [1.0]])  # 1, 1, 0: by their mean 1.5, 1.5, 0
        >>> rkd_distance_loss(student, teacher)  # by hand: 2 / 9 (0.75^2 / 2 + 0 + 0.75^2 / 2)
        tensor(0.1250)
    """
    require_two_images(student, "rkd")
    relations = _distances(student, squared, epsilon), _distances(teacher.detach(), squared, epsilon)
    return F.smooth_l1_loss(*relations)


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Smooth L1 distance between the cosines of all angles that three images of the batch form.

    .. math:: \frac{1}{B^3} \sum_{ijk} \ell_1(\cos\angle^s_{jik}, \cos\angle^t_{jik})

    Memory grows with :math:`B^2 D + B^3`.

    Args:
        student: embeddings or maps of B images, flattened to [B, D].
        teacher: likewise; the widths may differ.

    Example:
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # cosines 0 at the first, 0.7071 at the others
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])  # 1, -1, 1
        >>> # by hand: 2 / 27 (1 - 0.5 + (1.7071 - 0.5) + 0.2929^2 / 2)
        >>> rkd_angle_loss(student, teacher)
        tensor(0.1296)
    """
    require_two_images(student, "rkd")
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()))


def _distances(features: Tensor, squared: bool, epsilon: float) -> Tensor:
    """[B, B] distances divided by the mean over different images."""
    rows = at_least_float32(features).flatten(1)
    # From differences: |a|^2 + |b|^2 - 2ab cancels for images that lie close together.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=epsilon**0.5)
    if squared:
        distances = distances.square()
    distances = distances.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), 0)
    return distances / (distances.sum() / (len(rows) * (len(rows) - 1)))


def _cosines(features: Tensor) -> Tensor:
    """[B, B, B]: at image i, the cosine of the angle between the directions to j and to k."""
    rows = at_least_float32(features).flatten(1)
    directions = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=2)
    return inner_products(directions, directions)


class RKD(Method):
    """Labels plus relations of embeddings: ``CE + distance_weight * distances + angle_weight * angles``."""

    name = "rkd"
    needs = Requirements(embedding=True, several=True)

    distance_weight: NonNegative = option(default=25.0, doc="weight of the term on distances")
    angle_weight: NonNegative = option(default=50.0, doc="weight of the term on angles; 0 spares its memory")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.embedding is not None
        assert teacher.embedding is not None
        terms = {}
        if self.distance_weight:
            terms["distance"] = self.distance_weight * rkd_distance_loss(student.embedding, teacher.embedding)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * rkd_angle_loss(student.embedding, teacher.embedding)
        return terms
