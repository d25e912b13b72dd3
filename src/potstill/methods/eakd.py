"""Entropy-based adaptive distillation: larger weights for images on which teacher and student have high entropy.

Su, Tseng, Pu, Zhao, Chen and Lee, "EA-KD: Entropy-based Adaptive Knowledge Distillation", ICCV 2025.
https://arxiv.org/abs/2311.13621
Default is the paper: the student's entropy is divided by its upper bound, ln K.  The release does so on ImageNet, but
divides by 100 on CIFAR-100, which nearly removes the student's share: ``form="release"`` gives that constant.
"""

import math
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import softened_kl
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32

Form = Literal["paper", "release"]


@checked
def eakd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Positive = 4.0,
    entropy_temperature: Positive = 3.0,
    form: Form = "paper",
) -> Tensor:
    r"""Hinton's loss, weighted image by image with both entropies; batch mean.

    .. math:: w \, T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big), \quad
        w = \frac{1}{2} \Big(H_t + \frac{H_t H_s}{\ln K}\Big)

    The entropies H are those at their own temperature; w passes no gradient.

    Args:
        student_logits: [B, K], K of 2 or more.
        teacher_logits: [B, K].
        temperature: T > 0 of the divergence.
        entropy_temperature: T > 0 of the entropies.
        form: "paper" divides by ln K, "release" by 100.

    Example:
        >>> import torch
        >>> # KL 0.1308 from (3/4, 1/4) to (1/2, 1/2); H_t 0.5623 and H_s ln 2, so w = 0.5623
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()
        >>> eakd_loss(torch.zeros(1, 2), teacher, temperature=1.0, entropy_temperature=1.0)
        tensor(0.0736)
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    bound = math.log(student.shape[1]) if form == "paper" else 100.0
    teacher_entropy = _entropy(teacher / entropy_temperature)
    weight = teacher_entropy * (1 + _entropy(student.detach() / entropy_temperature) / bound) / 2
    return temperature**2 * (weight * softened_kl(student, teacher, temperature)).mean()


def _entropy(logits: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, dim=1)
    return -(log_probs.exp() * log_probs).sum(dim=1)


class EAKD(Method):
    """Labels and soft targets, unsure images first: ``ce_weight * CE + weight * EAKD``."""

    name = "eakd"

    temperature: Positive = option(default=4.0, doc="T of the divergence")
    entropy_temperature: Positive = option(default=3.0, doc="T of the entropies")
    form: Form = option(default="paper", doc='"paper" or "release", see ``eakd_loss``')
    weight: NonNegative = option(default=0.9, doc="weight of the soft targets")
    ce_weight: NonNegative = option(default=0.1, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"form": "release"},
        "imagenet/resnet34-resnet18": {
            "temperature": 1.0,
            "entropy_temperature": 2.0,
            "weight": 0.5,
            "ce_weight": 1.0,
        },
    }

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = eakd_loss(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            entropy_temperature=self.entropy_temperature,
            form=self.form,
        )
        return {"kd": self.weight * loss}
