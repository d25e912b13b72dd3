"""Probabilistic knowledge transfer: match each image's distribution over its neighbours.

Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.
https://arxiv.org/abs/1803.10837
The loss is a mean over all pairs, 1/B of the divergence of the paper's definition, as in the authors' code; the
weight 30000 belongs to it.  An embedding of zeros has no direction: it counts as unlike everything and gets no
gradient (NaN in the released code).
"""

import torch
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import inner_products, require_two_images
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def pkt_loss(student: Tensor, teacher: Tensor, *, epsilon: Positive = 1e-7) -> Tensor:
    r"""Divergence of the neighbour probabilities of teacher and student, averaged over all :math:`B^2` pairs.

    .. math:: \frac{1}{B^2} \sum_{ij} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \quad
        p_{ij} = \frac{(\cos(f_i, f_j) + 1) / 2}{\sum_k (\cos(f_i, f_k) + 1) / 2}

    Args:
        student: embeddings [B, D].
        teacher: likewise; the widths may differ.
        epsilon: keeps lengths and logarithms from 0.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # all alike: rows (0.5, 0.5)
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # cosines 1 and 0: rows (2/3, 1/3)
        >>> pkt_loss(student, teacher)  # by hand: (2/3 ln(4/3) + 1/3 ln(2/3)) / 2
        tensor(0.0283)
    """
    require_two_images(student, "pkt")
    ours, theirs = _neighbours(student, epsilon), _neighbours(teacher.detach(), epsilon)
    return (theirs * ((theirs + epsilon) / (ours + epsilon)).log()).mean()


def _neighbours(embedding: Tensor, epsilon: float) -> Tensor:
    rows = at_least_float32(embedding).flatten(1)
    zero = (rows == 0).all(dim=1, keepdim=True)
    rows = torch.where(zero, rows.detach(), rows)  # 1e7, the slope of x / (|x| + epsilon) at 0, is no direction
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + epsilon)
    similarities = (inner_products(rows, rows) + 1) / 2
    return similarities / similarities.sum(dim=1, keepdim=True)


class PKT(Method):
    """Labels plus neighbour probabilities of the embeddings: ``CE + weight * PKT``."""

    name = "pkt"
    needs = Requirements(embedding=True, several=True)

    weight: NonNegative = option(default=30000.0, doc="weight of the neighbour probabilities")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.embedding is not None
        assert teacher.embedding is not None
        return {"neighbours": self.weight * pkt_loss(student.embedding, teacher.embedding)}
