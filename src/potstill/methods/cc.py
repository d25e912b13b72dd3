"""Correlation congruence: match the similarities between all embeddings of a batch.

Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.
https://arxiv.org/abs/1904.01802
Three different losses go by this name.  Default is RepDistiller's, where the published numbers come from (its
authors had it from the paper's by mail); ``form="kernel"`` is the paper's: congruence of Gaussian kernel matrices,
expanded into a Taylor series, of embeddings of length 1.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products, require_equal_shapes, require_two_images
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Products of the deviations of neighbouring images in the batch, averaged.

    .. math:: \frac{1}{B - 1} \sum_{i=1}^{B-1} \sum_d \delta_{i,d} \, \delta_{i+1,d}, \quad
        \delta = \lvert f_s - f_t \rvert

    Args:
        student: embeddings [B, D].
        teacher: embeddings [B, D].  The gradient reaches them: they come through a trained layer.

    Example:
        >>> # by hand: deviations 1, 2, 3, so (1 * 2 + 2 * 3) / 2
        >>> cc_loss(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1))
        tensor(4.)
    """
    require_two_images(student, "cc")
    require_equal_shapes(student, teacher, "cc: the embeddings")
    deviation = (at_least_float32(student) - at_least_float32(teacher)).abs()
    return (deviation[:-1] * deviation[1:]).sum(dim=1).mean()


@checked
def cc_kernel_loss(student: Tensor, teacher: Tensor, *, gamma: Positive = 0.4, order: Count = 2) -> Tensor:
    r"""Mean squared difference of the Gaussian kernel matrices of unit embeddings, as a Taylor series.

    .. math:: K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} \langle f_i, f_j \rangle^p

    Args:
        student: embeddings [B, D].
        teacher: likewise; the widths may differ.  The gradient reaches them: they come through a trained layer.
        gamma: sharpness of the kernel.
        order: P, the highest power of the series.

    Example:
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> # off the diagonal: exp(-0.8) against exp(-0.8) (1 + 0.8 + 0.32), so half of (1.12 exp(-0.8))^2
        >>> cc_kernel_loss(student, teacher)
        tensor(0.1266)
    """
    require_two_images(student, "cc")
    return F.mse_loss(_kernel(student, gamma, order), _kernel(teacher, gamma, order))


def _kernel(embedding: Tensor, gamma: float, order: int) -> Tensor:
    rows = F.normalize(at_least_float32(embedding), dim=1)
    cosines = inner_products(rows, rows)
    series = [(2 * gamma) ** power / math.factorial(power) * cosines**power for power in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(series).sum(dim=0)


class CC(Method):
    """Labels plus congruence of linearly embedded features: ``CE + weight * CC``."""

    name = "cc"
    needs = Requirements(embedding=True, several=True)

    weight: NonNegative = option(default=0.02, doc="weight of the congruence")
    form: Literal["neighbours", "kernel"] = option(
        default="neighbours", doc='"neighbours", RepDistiller\'s; or "kernel", the paper\'s'
    )
    dim: Count = option(default=128, doc="width of the two trained embeddings")
    gamma: Positive = option(default=0.4, doc="gamma of the kernel form")
    order: Count = option(default=2, doc="order of the kernel form's series")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.outputs.embedding is not None
        assert teacher.outputs.embedding is not None
        self.embed_student = nn.Linear(student.outputs.embedding.shape[1], self.dim)
        self.embed_teacher = nn.Linear(teacher.outputs.embedding.shape[1], self.dim)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ours, theirs = self.embed_student(student.embedding), self.embed_teacher(teacher.embedding)
        if self.form == "kernel":
            loss = cc_kernel_loss(ours, theirs, gamma=self.gamma, order=self.order)
        else:
            loss = cc_loss(ours, theirs)
        return {"congruence": self.weight * loss}
