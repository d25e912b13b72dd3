"""Teacher-free knowledge distillation: a hand-made distribution, or an earlier copy of the student, as teacher.

Yuan, Tay, Li, Wang and Feng, "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020.
https://arxiv.org/abs/1909.11723
``tfkd_reg`` needs no teacher; ``tfkd_self`` takes a network like the student, trained on labels alone, as the teacher.
Default is the release, from which the published numbers come: its divergence is a mean over images and classes, K times
smaller than the paper's sum over classes, which its multiplier makes up for (and which therefore depends on K).
``reduction="batchmean"`` gives the paper's sum.  In ``tfkd_reg`` the release softens the hand-made probabilities, not
logarithms of them, and leaves the student at temperature 1; that is kept.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.kd import kd_loss
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, Share, checked, option
from potstill.types import Batch, Outputs, at_least_float32

Reduction = Literal["mean", "batchmean"]


@checked
def tfkd_reg_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 20.0,
    correct: Share = 0.99,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL divergence from a hand-made teacher, which is right with probability ``correct``, to the student.

    .. math:: \mathrm{KL}\big(\mathrm{softmax}(u / T) \,\|\, \mathrm{softmax}(z_s)\big), \quad
        u_y = c, \; u_{k \ne y} = \frac{1 - c}{K - 1}

    The softmax is taken over probabilities, which are at most 1: already at T = 1 the target is nearly uniform.

    Args:
        student_logits: [B, K], K of 2 or more.
        labels: [B], int64 class ids.
        temperature: T > 0 of the hand-made teacher; the student is taken at 1.
        correct: c, the teacher's probability of the label.
        reduction: "mean" over images and classes, or "batchmean", over images.

    Example:
        >>> # the target is softmax(1, 0) = (0.7311, 0.2689): ln 2 minus its entropy 0.5822, over two classes
        >>> tfkd_reg_loss(torch.zeros(1, 2), torch.tensor([0]), temperature=1.0, correct=1.0)
        tensor(0.0555)
    """
    student = F.log_softmax(at_least_float32(student_logits), dim=1)
    made = torch.full_like(student, (1 - correct) / (student.shape[1] - 1)).scatter(1, labels[:, None], correct)
    teacher = F.log_softmax(made / temperature, dim=1)
    return _reduced(F.kl_div(student, teacher, reduction="batchmean", log_target=True), student, reduction)


@checked
def tfkd_self_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive = 6.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""Hinton's loss with the release's reduction.

    .. math:: \frac{T^2}{K} \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)

    Args:
        student_logits, teacher_logits: [B, K].
        reduction: "mean" over images and classes, or "batchmean", over images.

    Example:
        >>> # as in kd_loss, 1.3113, over two classes
        >>> tfkd_self_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0)
        tensor(0.6556)
    """
    loss = kd_loss(student_logits, teacher_logits, temperature=temperature)
    return _reduced(loss, student_logits, reduction)


def _reduced(loss: Tensor, logits: Tensor, reduction: Reduction) -> Tensor:
    return loss / logits.shape[1] if reduction == "mean" else loss


class TfKDReg(Method):
    """Labels and a hand-made teacher: ``(1 - alpha) * CE + alpha * multiplier * KL``."""

    name = "tfkd_reg"
    needs = Requirements(teacher=False, labels=True)

    alpha: Share = option(
        default=0.1,
        doc="weight of the hand-made teacher (the paper's alpha, not that of method kd); labels get the rest",
    )
    temperature: Positive = option(default=20.0, doc="temperature of the hand-made teacher")
    multiplier: NonNegative = option(
        default=100.0, doc="multiplier of its divergence; makes up for the mean over classes"
    )
    correct: Share = option(default=0.99, doc="the hand-made teacher's probability of the label before softening")
    reduction: Reduction = option(
        default="mean", doc='"mean" (the release) or "batchmean" (the paper: set ``multiplier=1``)'
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet18": {"alpha": 0.1, "temperature": 20.0, "multiplier": 100.0},
        "cifar100/mobilenetv2": {"alpha": 0.95, "temperature": 40.0, "multiplier": 1.0},
    }

    @property
    def label_weight(self) -> float:
        return 1 - self.alpha

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = tfkd_reg_loss(
            student.logits,
            batch.labels,
            temperature=self.temperature,
            correct=self.correct,
            reduction=self.reduction,
        )
        return {"tfkd": self.alpha * self.multiplier * loss}


class TfKDSelf(Method):
    """Labels and the student's earlier self: ``(1 - alpha) * CE + alpha * multiplier * KD / K``."""

    name = "tfkd_self"

    alpha: Share = option(
        default=0.95, doc="weight of the teacher (the paper's alpha, not that of method kd); labels get the rest"
    )
    temperature: Positive = option(default=6.0, doc="temperature of both")
    multiplier: NonNegative = option(
        default=50.0, doc="multiplier of the divergence; makes up for the mean over classes"
    )
    reduction: Reduction = option(
        default="mean", doc='"mean" (the release) or "batchmean" (the paper: set ``multiplier=1``)'
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet18": {"alpha": 0.95, "temperature": 6.0, "multiplier": 50.0},
        "cifar100/mobilenetv2": {"alpha": 0.95, "temperature": 20.0, "multiplier": 1.0},
    }

    @property
    def label_weight(self) -> float:
        return 1 - self.alpha

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = tfkd_self_loss(student.logits, teacher.logits, temperature=self.temperature, reduction=self.reduction)
        return {"tfkd": self.alpha * self.multiplier * loss}
