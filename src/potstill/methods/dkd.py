"""Decoupled knowledge distillation: separate weights for the labelled class and for the distribution over the others.

Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022.  https://arxiv.org/abs/2203.08679
Paper and release (mdistiller) agree.  The release takes the logarithm of a sum that can round to 0 and is infinite for
a student that is very sure; here it is computed in log space and stays finite, with equal values elsewhere.
The authors choose beta for each pair of networks (presets): larger where the teacher is surer of itself.
"""

from typing import Any, ClassVar

from torch import Tensor

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import drop_target, require_three_classes, softened_kl, softened_target_kl
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def tckd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: Positive) -> Tensor:
    r"""Target-class part of DKD: KL divergence between "the labelled class" and "any other", batch mean.

    .. math:: T^2 \, \mathrm{KL}\big((p_y, 1 - p_y) \,\|\, (q_y, 1 - q_y)\big),
        \quad p = \mathrm{softmax}(z_t / T), \; q = \mathrm{softmax}(z_s / T)

    Logits are [B, K], ``labels`` int64 [B] class ids.

    Example:
        >>> import torch
        >>> # teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
        >>> tckd_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]), temperature=1.0)
        tensor(0.1308)
    """
    return temperature**2 * softened_target_kl(student_logits, teacher_logits, labels, temperature).mean()


@checked
def nckd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: Positive) -> Tensor:
    r"""Non-target part of DKD: KL divergence among the classes other than the labelled one, batch mean.

    .. math:: T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_{t, \setminus y} / T) \,\|\,
        \mathrm{softmax}(z_{s, \setminus y} / T)\big)

    With two classes only one is left and the loss is 0 whatever the logits.

    Logits are [B, K], ``labels`` int64 [B] class ids.

    Example:
        >>> import torch
        >>> # without class 0: teacher (3/4, 1/4), student (1/2, 1/2)
        >>> nckd_loss(torch.zeros(1, 3), torch.tensor([[9.0, 3.0, 1.0]]).log(), torch.tensor([0]), temperature=1.0)
        tensor(0.1308)
    """
    student, teacher = (drop_target(at_least_float32(each), labels) for each in (student_logits, teacher_logits))
    return temperature**2 * softened_kl(student, teacher, temperature).mean()


@checked
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 4.0,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 8.0,
) -> Tensor:
    r"""Weighted sum of the target-class and the non-target part of Hinton's loss.

    .. math:: \alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD}

    Hinton's loss is alpha = 1 and beta = 1 - p_y: a teacher that is sure of the label hides what it knows of the other
    classes.

    Args:
        student_logits, teacher_logits: [B, K].
        labels: [B], int64 class ids.
        alpha: weight of ``tckd_loss``.
        beta: weight of ``nckd_loss``.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[12.0, 3.0, 1.0]]).log()
        >>> # target (3/4, 1/4) against (1/3, 2/3): 0.3630; others (3/4, 1/4) against (1/2, 1/2): 0.1308
        >>> dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=2.0)
        tensor(0.6246)
    """
    target = tckd_loss(student_logits, teacher_logits, labels, temperature=temperature)
    others = nckd_loss(student_logits, teacher_logits, labels, temperature=temperature)
    return alpha * target + beta * others


class DKD(Method):
    """Labels and the two parts of soft targets: ``CE + w * (alpha * TCKD + beta * NCKD)``, w rising to 1.

    Traps:
        Two classes are refused: the non-target part is then 0.
    """

    name = "dkd"
    needs = Requirements(labels=True, epoch=True)

    temperature: Positive = option(default=4.0, doc="T of both parts")
    alpha: NonNegative = option(default=1.0, doc="weight of the target-class part")
    beta: NonNegative = option(default=8.0, doc="weight of the non-target part")
    warmup_epochs: Epochs = option(default=20.0, of_epochs=240, doc="until both weights are whole; 0: from the start")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet56-resnet20": {"beta": 2.0},
        "cifar100/resnet110-resnet32": {"beta": 2.0},
        "cifar100/resnet32x4-resnet8x4": {"beta": 8.0},
        "cifar100/wrn_40_2-wrn_16_2": {"beta": 6.0},
        "cifar100/wrn_40_2-wrn_40_1": {"beta": 6.0},
        "cifar100/vgg13-vgg8": {"beta": 6.0},
        "cifar100/resnet32x4-shufflenetv1": {"beta": 8.0},
        "cifar100/wrn_40_2-shufflenetv1": {"beta": 8.0},
        "cifar100/resnet32x4-shufflenetv2": {"beta": 8.0},
        "cifar100/resnet50-mobilenetv2": {"beta": 8.0},
        "cifar100/vgg13-mobilenetv2": {"beta": 6.0},
        "imagenet/resnet34-resnet18": {"temperature": 1.0, "beta": 0.5, "warmup_epochs": 1.0},
        "imagenet/resnet50-mobilenetv1": {"temperature": 1.0, "beta": 2.0, "warmup_epochs": 1.0},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        require_three_classes("dkd", training.classes)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        require_three_classes("dkd", student.logits.shape[1])
        given = (student.logits, teacher.logits, batch.labels)
        factor = self.warmup(self.in_epochs("warmup_epochs"))
        return {
            "tckd": factor * self.alpha * tckd_loss(*given, temperature=self.temperature),
            "nckd": factor * self.beta * nckd_loss(*given, temperature=self.temperature),
        }
