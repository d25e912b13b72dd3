"""Refined logit distillation: match the teacher's confidence, and its classes except those ranked above the label.

Sun, Chen, Lyu, Chen, Chen and Wang, "Knowledge Distillation with Refined Logits", ICCV 2025.
https://arxiv.org/abs/2408.07703
Paper and release agree.  The release takes logarithms of sums that can round to 0; here they are computed in log space
and stay finite, with equal values elsewhere.  The release's switch for standardised logits is the method ``ls`` here.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import binary_log_probs, require_three_classes, softened_kl
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32

MASKED = -1e9  # finite, so that a row in which every class is masked is uniform on both sides and adds 0


@checked
def scd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    r"""Sample confidence: the student's probability of the label follows the teacher's largest one; batch mean.

    .. math:: T^2 \, \mathrm{KL}\big((p_{\max}, 1 - p_{\max}) \,\|\, (q_y, 1 - q_y)\big),
        \quad p = \mathrm{softmax}(z_t / T), \; q = \mathrm{softmax}(z_s / T)

    Logits are [B, K], ``labels`` int64 [B] class ids.

    Example:
        >>> import torch
        >>> # the teacher's largest is 3/4, of a class that is not the label: 3/4 ln(3/2) + 1/4 ln(1/2)
        >>> scd_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log(), torch.tensor([0]))
        tensor(0.1308)
    """
    teacher_logits = at_least_float32(teacher_logits.detach())
    student = binary_log_probs(at_least_float32(student_logits) / temperature, labels)
    teacher = binary_log_probs(teacher_logits / temperature, teacher_logits.argmax(dim=1))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@checked
def mcd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: Positive = 4.0) -> Tensor:
    r"""Masked correlation: KL divergence among the classes that the teacher ranks below the label; batch mean.

    .. math:: T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_{t, M} / T) \,\|\, \mathrm{softmax}(z_{s, M} / T)\big),
        \quad M = \{k : z_{t,k} < z_{t,y}\}

    An image whose label is the teacher's lowest class has no class left and adds 0.

    Logits are [B, K], ``labels`` int64 [B] class ids.

    Example:
        >>> import torch
        >>> # class 0 is above the label 1 and left out; below it: teacher (3/4, 1/4), student (1/2, 1/2)
        >>> teacher = torch.tensor([[9.0, 8.0, 3.0, 1.0]]).log()
        >>> mcd_loss(torch.zeros(1, 4), teacher, torch.tensor([1]), temperature=1.0)
        tensor(0.1308)
    """
    teacher_logits = at_least_float32(teacher_logits.detach())
    mask = teacher_logits >= teacher_logits.gather(1, labels[:, None])
    masked = MASKED * temperature
    student, teacher = (
        at_least_float32(student_logits).masked_fill(mask, masked),
        teacher_logits.masked_fill(mask, masked),
    )
    return temperature**2 * softened_kl(student, teacher, temperature).mean()


@checked
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 4.0,
    confidence_temperature: Positive = 1.0,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 8.0,
) -> Tensor:
    r"""Weighted sum of the two parts.

    .. math:: \alpha \, \mathrm{SCD} + \beta \, \mathrm{MCD}

    Args:
        student_logits, teacher_logits: [B, K].
        labels: [B], int64 class ids.
        temperature: T > 0 of ``mcd_loss``.
        confidence_temperature: T > 0 of ``scd_loss``.
        alpha: weight of ``scd_loss``.
        beta: weight of ``mcd_loss``.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[12.0, 3.0, 1.0]]).log()
        >>> # (3/4, 1/4) against (1/3, 2/3): 0.3630; twice (3/4, 1/4) against (1/2, 1/2): 0.1308
        >>> rld_loss(student, teacher, torch.tensor([0]), temperature=1.0, beta=2.0)
        tensor(0.6246)
    """
    confidence = scd_loss(student_logits, teacher_logits, labels, temperature=confidence_temperature)
    correlation = mcd_loss(student_logits, teacher_logits, labels, temperature=temperature)
    return alpha * confidence + beta * correlation


class RLD(Method):
    """Labels and refined logits: ``CE + w * (alpha * SCD + beta * MCD)``, w rising to 1.

    Traps:
        Two classes are refused: at most one is then ranked below the label, and its part is 0.
    """

    name = "rld"
    needs = Requirements(labels=True, epoch=True)

    temperature: Positive = option(default=4.0, doc="T of the classes ranked below the label")
    confidence_temperature: Positive = option(default=1.0, doc="T of the confidence")
    alpha: NonNegative = option(default=1.0, doc="weight of the confidence")
    beta: NonNegative = option(default=8.0, doc="weight of the classes ranked below the label")
    warmup_epochs: Epochs = option(default=20.0, of_epochs=240, doc="until both weights are whole; 0: from the start")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet/resnet34-resnet18": {"temperature": 1.0, "beta": 0.5},
        "imagenet/resnet50-mobilenetv1": {"temperature": 1.0, "beta": 2.0},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        require_three_classes("rld", training.classes)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        require_three_classes("rld", student.logits.shape[1])
        given = (student.logits, teacher.logits, batch.labels)
        factor = self.warmup(self.in_epochs("warmup_epochs"))
        return {
            "scd": factor * self.alpha * scd_loss(*given, temperature=self.confidence_temperature),
            "mcd": factor * self.beta * mcd_loss(*given, temperature=self.temperature),
        }
