"""Weighted transformed teacher matching: TTM, with larger weights where the teacher's distribution is flat.

Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024.
https://arxiv.org/abs/2402.11148
Paper and release agree.  The weight of an image lies between 1 (a sure teacher) and K to the power 1 - gamma (one that
has no information), so the weight of the term should fall as the number of classes grows.
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.ttm import divergence_from_transformed
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: Positive = 0.2) -> Tensor:
    r"""TTM's divergence, weighted image by image with the teacher's power sum; batch mean.

    .. math:: \Big(\sum_k p_k^\gamma\Big) \, \mathrm{KL}(r \,\|\, \mathrm{softmax}(z_s)), \quad
        r_k = p_k^\gamma \Big/ \sum_j p_j^\gamma, \quad p = \mathrm{softmax}(z_t)

    Args:
        student_logits, teacher_logits: [B, K].
        gamma: exponent above 0, one over the teacher's temperature.

    Example:
        >>> import torch
        >>> # (0.9, 0.1) to the power 1/2 sums to 1.2649; times 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308
        >>> wttm_loss(torch.zeros(1, 2), torch.tensor([[9.0, 1.0]]).log(), gamma=0.5)
        tensor(0.1655)
    """
    log_power_sum = (gamma * F.log_softmax(at_least_float32(teacher_logits.detach()), dim=1)).logsumexp(dim=1)
    return (log_power_sum.exp() * divergence_from_transformed(student_logits, teacher_logits, gamma)).mean()


class WTTM(Method):
    """Labels and the transformed teacher, unsure images first: ``CE + weight * WTTM``."""

    name = "wttm"

    gamma: Positive = option(default=0.2, doc="exponent of the teacher's probabilities, one over its temperature")
    weight: NonNegative = option(
        default=4.0,
        doc="weight of the divergence. Both are tuned for each pair of networks; the defaults are the authors' "
        "example for 100 classes.",
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"wttm": self.weight * wttm_loss(student.logits, teacher.logits, gamma=self.gamma)}
