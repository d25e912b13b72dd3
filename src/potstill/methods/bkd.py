"""Binary distillation: match one-vs-rest (sigmoid) probabilities, one binary problem a class.

Hao, Guo, Han, Hu, Xu and Wang, "Revisit the Power of Vanilla Knowledge Distillation: from Small Scale to Large Scale",
NeurIPS 2023 (there called binary KL).  https://arxiv.org/abs/2305.15781
The form of the authors' code: a binary cross-entropy, so that it does not reach 0, averaged over images and classes.
The student's classes do not compete (a sigmoid each), the teacher's do (softmax).
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def bkd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Binary cross-entropy between the student's sigmoids and the teacher's probabilities.

    .. math:: -\frac{1}{B K} \sum_{b,k} p_k \log \sigma(z_{s,k}) + (1 - p_k) \log(1 - \sigma(z_{s,k})),
        \quad p = \mathrm{softmax}(z_t)

    Logits are [B, K].

    Example:
        >>> import torch
        >>> bkd_loss(torch.zeros(1, 2), torch.tensor([[5.0, 0.0]]))  # a student that never commits itself: ln 2
        tensor(0.6931)
    """
    targets = F.softmax(at_least_float32(teacher_logits.detach()), dim=1)
    return F.binary_cross_entropy_with_logits(at_least_float32(student_logits), targets)


class BKD(Method):
    """Labels and the teacher's probabilities as yes-or-no questions: ``CE + weight * BCE(student, teacher)``."""

    name = "bkd"

    weight: NonNegative = option(
        default=1.0, doc="weight of the binary term, which is a mean over classes and so shrinks as their number grows"
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"bkd": self.weight * bkd_loss(student.logits, teacher.logits)}
