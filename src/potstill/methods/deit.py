"""DeiT: a second head learns from the teacher, beside the one for labels; the prediction is the mean of both.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021.
https://arxiv.org/abs/2012.12877
``deit_hard`` takes the teacher's first class as a label, ``deit_soft`` its softened probabilities.  For the soft form,
default is the paper's divergence; the release divides it by the number of classes as well (``reduction="mean"``), which
makes it K times weaker.  The student must have submodules ``head`` and ``head_dist``, each putting out logits, and put
out their mean, as timm's ``deit_*_distilled`` do; any network of one's own with these two will do.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.methods.base import Method
from potstill.methods.kd import kd_loss
from potstill.options import Positive, Share, checked, option
from potstill.types import Batch, Outputs, at_least_float32

Reduction = Literal["batchmean", "mean"]
HEADS = ("head", "head_dist")  # paths in the student: for labels, and for the teacher


def deit_hard_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Cross-entropy with the teacher's first class as the label; batch mean.

    .. math:: -\frac{1}{B} \sum_b \log \mathrm{softmax}(z_s)_{b, \arg\max z_t}

    Args:
        student_logits: [B, K], of the distillation head.
        teacher_logits: [B, K].

    Example:
        >>> import torch
        >>> deit_hard_loss(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0.1, 0.2]]))  # ln 4
        tensor(1.3863)
    """
    return F.cross_entropy(at_least_float32(student_logits), teacher_logits.argmax(dim=1))


@checked
def deit_soft_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Positive = 3.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Hinton's loss, or the release's: divided by the number of classes as well.

    .. math:: T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)

    Args:
        student_logits: [B, K], of the distillation head.
        teacher_logits: [B, K].
        reduction: "batchmean", over images, or "mean", over images and classes.

    Example:
        >>> import torch
        >>> # as in kd_loss, 1.3113, over two classes
        >>> deit_soft_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0, reduction="mean")
        tensor(0.6556)
    """
    loss = kd_loss(student_logits, teacher_logits, temperature=temperature)
    return loss / student_logits.shape[1] if reduction == "mean" else loss


class DeiTHard(Method):
    """Labels for one head, the teacher's first class for the other: ``(1 - alpha) * CE + alpha * CE_teacher``."""

    name = "deit_hard"
    student_taps = HEADS

    alpha: Share = option(
        default=0.5, doc="weight of the teacher (the paper's alpha, not that of method kd); labels get the rest"
    )

    @property
    def label_weight(self) -> float:
        return 1 - self.alpha

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"ce": (1 - self.alpha) * self.label_loss(head_logits(student, "head"), batch.targets)}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"hard": self.alpha * deit_hard_loss(head_logits(student, "head_dist"), teacher.logits)}


class DeiTSoft(Method):
    """Labels for one head, the teacher's soft targets for the other: ``(1 - alpha) * CE + alpha * KD``."""

    name = "deit_soft"
    student_taps = HEADS

    alpha: Share = option(
        default=0.1, doc="weight of the teacher (the paper's alpha, not that of method kd); labels get the rest"
    )
    temperature: Positive = option(default=3.0, doc="T of the soft targets")
    reduction: Reduction = option(
        default="batchmean", doc='"batchmean" (the paper) or "mean" (the release: over images and classes)'
    )

    @property
    def label_weight(self) -> float:
        return 1 - self.alpha

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"ce": (1 - self.alpha) * self.label_loss(head_logits(student, "head"), batch.targets)}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = deit_soft_loss(
            head_logits(student, "head_dist"),
            teacher.logits,
            temperature=self.temperature,
            reduction=self.reduction,
        )
        return {"soft": self.alpha * loss}


def head_logits(student: Outputs, path: str) -> Tensor:
    """Return logits [B, K] of one of the two heads, in at least float32."""
    logits = at_least_float32(student.features[path])
    if logits.shape != student.logits.shape:
        raise UsageError(
            f"the student's {path!r} must put out logits {list(student.logits.shape)}, got {list(logits.shape)}; "
            "deit is for students with a distillation token, such as timm's deit_tiny_distilled_patch16_224; use kd"
        )
    return logits
