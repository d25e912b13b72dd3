"""Transformed teacher matching: a temperature on the teacher only; the student is compared at temperature 1.

Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024.
https://arxiv.org/abs/2402.11148
Paper and release agree.  The release raises probabilities to the power gamma; here the logits are scaled instead, which
is the same and does not underflow.  No factor T squared: the gradient does not shrink, as the student is not softened.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


def divergence_from_transformed(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Tensor:
    """For each image the KL divergence of ``ttm_loss``: [B, K] and [B, K] -> [B]."""
    student = F.log_softmax(at_least_float32(student_logits), dim=1)
    teacher = F.log_softmax(gamma * at_least_float32(teacher_logits.detach()), dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


@checked
def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: Positive = 0.1) -> Tensor:
    r"""KL divergence from the power-transformed teacher to the student, batch mean.

    .. math:: \mathrm{KL}(r \,\|\, \mathrm{softmax}(z_s)), \quad r_k = p_k^\gamma \Big/ \sum_j p_j^\gamma,
        \quad p = \mathrm{softmax}(z_t)

    Args:
        student_logits, teacher_logits: [B, K].
        gamma: exponent above 0, one over the teacher's temperature.

    Example:
        >>> import torch
        >>> # (9, 1) to the power 1/2 is (3, 1): 3/4 ln(3/2) + 1/4 ln(1/2)
        >>> ttm_loss(torch.zeros(1, 2), torch.tensor([[9.0, 1.0]]).log(), gamma=0.5)
        tensor(0.1308)
    """
    return divergence_from_transformed(student_logits, teacher_logits, gamma).mean()


class TTM(Method):
    """Labels and the transformed teacher: ``CE + weight * KL(transformed teacher || student)``."""

    name = "ttm"

    gamma: Positive = option(default=0.1, doc="exponent of the teacher's probabilities, one over its temperature")
    weight: NonNegative = option(
        default=45.0,
        doc="weight of the divergence. Both are tuned for each pair of networks; the defaults are the authors' "
        "example.",
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"cifar100/vgg13-vgg8": {"gamma": 0.1, "weight": 45.0}}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"ttm": self.weight * ttm_loss(student.logits, teacher.logits, gamma=self.gamma)}
