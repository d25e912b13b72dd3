"""Attention Transfer: match spatial attention maps, the mean squared activation at each position.

Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer", ICLR 2017.  https://arxiv.org/abs/1612.03928
Default is the form of the authors' code ("release", with the weight 1000), from which all published numbers come: a
mean of squares over batch and places, so that the term shrinks with the size of the map.  ``form="paper"`` is the
formula of the text: the length of the difference for each image (not squared), averaged over the batch.  Its values are
some hundred times larger, so it wants a weight of its own.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.features import pool_to_common_size
from potstill.methods.base import Method
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def at_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    power: Count = 2,
    form: Literal["release", "paper"] = "release",
) -> Tensor:
    r"""Difference of normalised attention maps, summed over the pairs of feature maps.

    .. math:: A(F) = \frac{v}{\lVert v \rVert_2}, \quad v_{hw} = \frac{1}{C} \sum_c F_{chw}^p, \qquad
        \sum_\text{pairs} \frac{1}{B H W} \sum_{b,h,w} (A_s - A_t)^2

    The paper's form is :math:`\sum_\text{pairs} \frac{1}{B} \sum_b \lVert A_s - A_t \rVert_2` with :math:`|F|` for F.
    Numbers of channels may differ; of two sizes, the larger map is averaged down to the smaller.

    Args:
        student_maps: each of [B, C, H, W].
        teacher_maps: as many, of the same B.
        power: p, at least 1.
        form: "release" or "paper".

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> at_loss([student], [teacher])  # A is (1, 0) and (0, 1): two differences of 1, over two places
        tensor(1.)
        >>> at_loss([student], [teacher], form="paper")  # the length of (1, -1)
        tensor(1.4142)
    """
    terms = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = pool_to_common_size(at_least_float32(student), at_least_float32(teacher.detach()))
        if form == "paper":  # the release takes no absolute values; the same for even powers, or after a ReLU
            student, teacher = student.abs(), teacher.abs()
        difference = _attention(student, power) - _attention(teacher, power)
        terms.append(difference.square().mean() if form == "release" else difference.norm(dim=1).mean())
    return torch.stack(terms).sum()


def _attention(features: Tensor, power: int) -> Tensor:
    return F.normalize(features.pow(power).mean(dim=1).flatten(1), dim=1)


class AT(Method):
    """Labels and attention: ``CE + weight * sum of AT over paired stages``."""

    name = "at"
    needs = Requirements(maps="pairs")

    weight: NonNegative = option(default=1000.0, doc='weight of the attention term; 1000 goes with the form "release"')
    power: Count = option(default=2, doc="p of the attention map")
    form: Literal["release", "paper"] = option(default="release", doc='"release" or "paper", see ``at_loss``')
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = at_loss(student.maps, teacher.maps, power=self.power, form=self.form)
        return {"attention": self.weight * loss}
