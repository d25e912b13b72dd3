"""Weighted soft labels: smaller weights for images on which the student's loss is low relative to the teacher's.

Zhou, Song, Chen, Zhou, Wang, Yuan and Zhang, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
Tradeoff Perspective", ICLR 2021.  https://arxiv.org/abs/2102.00650
Paper and release agree; the term is a cross-entropy, so it does not reach 0.  The release is written for 1000 classes;
here the number follows the logits.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: Positive = 2.0) -> Tensor:
    r"""Soft cross-entropy, weighted image by image with how far the student's error exceeds the teacher's; batch mean.

    .. math:: T^2 u \sum_k -p_k \log q_k, \quad u = 1 - \exp\Big(-\frac{\mathrm{CE}(z_s, y)}{\mathrm{CE}(z_t, y)}\Big),
        \quad p = \mathrm{softmax}(z_t / T), \; q = \mathrm{softmax}(z_s / T)

    The weight u, from 0 to 1, is taken at temperature 1 and passes no gradient.

    Logits are [B, K], ``labels`` int64 [B] class ids.

    Example:
        >>> # equal logits: both errors are ln 2, u = 1 - 1/e = 0.6321, times the soft cross-entropy ln 2
        >>> wsld_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), temperature=1.0)
        tensor(0.4382)
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    student_error = F.cross_entropy(student.detach(), labels, reduction="none")
    teacher_error = F.cross_entropy(teacher, labels, reduction="none")
    weight = 1 - torch.exp(-student_error / (teacher_error + 1e-7))  # a sure teacher's error can be 0
    soft = -(F.softmax(teacher / temperature, dim=1) * F.log_softmax(student / temperature, dim=1)).sum(dim=1)
    return temperature**2 * (weight * soft).mean()


class WSLD(Method):
    """Labels and weighted soft targets: ``CE + alpha * WSLD``."""

    name = "wsld"
    needs = Requirements(labels=True)

    temperature: Positive = option(default=2.0, doc="T of the soft targets")
    alpha: NonNegative = option(
        default=2.5, doc="weight of the soft targets (the paper's alpha, not that of method kd)"
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"temperature": 4.0, "alpha": 2.25},
        "imagenet": {"temperature": 2.0, "alpha": 2.5},
    }

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = wsld_loss(student.logits, teacher.logits, batch.labels, temperature=self.temperature)
        return {"wsld": self.alpha * loss}
