"""Normalised knowledge distillation: the teacher's probability of the label, and the other classes renormalised.

Yang, Zeng, Li, Zhang, Yuan and Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023.  https://arxiv.org/abs/2303.13005
Paper and release (cls_KD) agree.  Both parts are cross-entropies: at their smallest they are the teacher's entropy and
not 0.  The label part is taken at temperature 1, the other at T.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import drop_target, require_three_classes
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


def _ids(labels: Tensor) -> Tensor:
    return labels.argmax(dim=1) if labels.dim() == 2 else labels


def nkd_target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of the label, weighted by the teacher's probability for it; batch mean.

    .. math:: -\mathrm{softmax}(z_t)_y \, \log \mathrm{softmax}(z_s)_y

    Args:
        student_logits, teacher_logits: [B, K].
        labels: [B], int64 class ids; or [B, K], of which the largest counts.

    Example:
        >>> import torch
        >>> nkd_target_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))  # 3/4 ln 2
        tensor(0.5199)
    """
    targets = _ids(labels)[:, None]
    student = F.log_softmax(at_least_float32(student_logits), dim=1).gather(1, targets)
    teacher = F.softmax(at_least_float32(teacher_logits.detach()), dim=1).gather(1, targets)
    return -(teacher * student).mean()


@checked
def nkd_others_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: Positive) -> Tensor:
    r"""Cross-entropy among the classes other than the label, each side rescaled to sum to 1; batch mean.

    .. math:: -T^2 \sum_{k \ne y} q^t_k \log q^s_k, \quad q = \mathrm{softmax}(z_{\setminus y} / T)

    With two classes only one is left and the loss is 0 whatever the logits.

    Args:
        student_logits, teacher_logits: [B, K].
        labels: [B], int64 class ids; or [B, K], of which the largest counts.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[9.0, 3.0, 1.0]]).log()
        >>> nkd_others_loss(torch.zeros(1, 3), teacher, torch.tensor([0]), temperature=1.0)  # ln 2
        tensor(0.6931)
    """
    targets = _ids(labels)
    student = F.log_softmax(drop_target(at_least_float32(student_logits), targets) / temperature, dim=1)
    teacher = F.softmax(drop_target(at_least_float32(teacher_logits.detach()), targets) / temperature, dim=1)
    return -(temperature**2) * (teacher * student).sum(dim=1).mean()


@checked
def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 1.0,
    gamma: NonNegative = 1.5,
) -> Tensor:
    r"""Both parts of NKD.

    .. math:: \mathrm{target} + \gamma \, \mathrm{others}

    Args:
        student_logits, teacher_logits: [B, K].
        labels: [B], int64 class ids; or [B, K], of which the largest counts.
        temperature: T > 0 of ``nkd_others_loss``.
        gamma: its weight.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[12.0, 3.0, 1.0]]).log()
        >>> nkd_loss(student, teacher, torch.tensor([0]), gamma=2.0)  # 3/4 ln 3 + 2 ln 2
        tensor(2.2103)
    """
    target = nkd_target_loss(student_logits, teacher_logits, labels)
    return target + gamma * nkd_others_loss(student_logits, teacher_logits, labels, temperature=temperature)


class NKD(Method):
    """Labels, the teacher's probability of them, and the other classes: ``CE + target + gamma * others``.

    Traps:
        Two classes are refused: the part on the others is then 0.
    """

    name = "nkd"
    needs = Requirements(labels=True)

    temperature: Positive = option(default=1.0, doc="T of the part on the other classes")
    gamma: NonNegative = option(default=1.5, doc="its weight (the authors take 1 for DeiT)")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"temperature": 3.0, "gamma": 3.5},
        "imagenet": {"temperature": 1.0, "gamma": 1.5},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        require_three_classes("nkd", training.classes)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        require_three_classes("nkd", student.logits.shape[1])
        given = (student.logits, teacher.logits, batch.targets)
        return {
            "target": nkd_target_loss(*given),
            "others": self.gamma * nkd_others_loss(*given, temperature=self.temperature),
        }
