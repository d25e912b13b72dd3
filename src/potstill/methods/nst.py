"""NST: match the distribution of each channel's activations over positions, by maximum mean discrepancy.

Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017.
https://arxiv.org/abs/1707.01219
The squared maximum mean discrepancy with the polynomial kernel of degree 2, the one of the published CIFAR numbers
(RepDistiller).  The kernel of two sets of channels has a closed form through their products, so that memory is
B * C * C and not B * C * C * H * W as in the released code; values are the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.features import pool_to_common_size
from potstill.methods.base import Method
from potstill.methods.numerics import inner_products
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def nst_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Squared maximum mean discrepancy between the channels of two maps, summed over the pairs.

    .. math:: \sum_\text{pairs} \overline{k(t, t)} + \overline{k(s, s)} - 2 \, \overline{k(s, t)}, \qquad
        k(a, b) = (a^\top b)^2

    Means run over batch and pairs of channels; a channel is its H W values, divided by their length.  Numbers of
    channels may differ; of two sizes, the larger map is averaged down to the smaller.

    Args:
        student_maps: each of [B, C, H, W].
        teacher_maps: as many, of the same B.

    Returns:
        A scalar, at least 0 up to rounding.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[3.0, 3.0]]]])
        >>> nst_loss([student], [teacher])  # 1 + 1 - 2 cos(45 degrees)^2
        tensor(1.0000)
    """
    terms = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = pool_to_common_size(at_least_float32(student), at_least_float32(teacher.detach()))
        ours, theirs = (F.normalize(features.flatten(2), dim=2) for features in (student, teacher))
        terms.append(_kernel(theirs, theirs) + _kernel(ours, ours) - 2 * _kernel(ours, theirs))
    return torch.stack(terms).sum()


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return inner_products(first, second).square().mean()


class NST(Method):
    """Labels and distributions of channels at paired stages: ``CE + weight * sum of NST``."""

    name = "nst"
    needs = Requirements(maps="pairs")

    weight: NonNegative = option(default=50.0, doc="weight of the discrepancies; 50 in RepDistiller")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"nst": self.weight * nst_loss(student.maps, teacher.maps)}
