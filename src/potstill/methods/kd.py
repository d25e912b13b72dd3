"""Knowledge distillation: match the teacher's softened class probabilities.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014.
https://arxiv.org/abs/1503.02531

Traps:
- The divergence is summed over classes and averaged over the batch.  ``torch.nn.KLDivLoss()`` by default divides by the
  number of classes too, which makes the term K times weaker (so do DeiT's, Tf-KD's and TAKD's code).
- ``alpha`` is the weight of the labels, as in the paper; others call the teacher's weight so.
- Published numbers differ by half a point with the weights of the two terms: 0.1 and 0.9 at T = 4 in RepDistiller and
  mdistiller on CIFAR (preset ``cifar100``), 1 and 1 or 1 and 9 elsewhere.
- The factor T squared is there at every alpha, 0 included; some libraries drop it then.
"""

from typing import Any, ClassVar

from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import Confidence, confidence_weights, softened_kl
from potstill.options import Positive, Share, checked, option
from potstill.types import Batch, Outputs


@checked
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive) -> Tensor:
    r"""Temperature-scaled KL divergence from teacher to student: summed over classes, averaged over the batch.

    .. math:: T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)

    The factor :math:`T^2` keeps the gradient's size when the temperature changes (section 2 of the paper).  Dividing
    by the number of classes as well (``KLDivLoss`` with "mean") would weaken the term K times.

    Args:
        student_logits: shape [B, K].
        teacher_logits: shape [B, K]; no gradient reaches them.
        temperature: T > 0; a higher value gives softer targets.

    Returns:
        A scalar, at least 0, in float32 or in float64 where the logits came so.

    Raises:
        UsageError: ``temperature`` is not above 0.

    Example:
        >>> import torch
        >>> # by hand: 4 (0.8808 ln(0.8808 / 0.5) + 0.1192 ln(0.1192 / 0.5))
        >>> kd_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0)
        tensor(1.3113)
    """
    return temperature**2 * softened_kl(student_logits, teacher_logits, temperature).mean()


class KD(Method):
    """Labels and soft targets: ``alpha * CE + (1 - alpha) * KD``."""

    name = "kd"

    temperature: Positive = option(default=2.0, doc="T of the soft targets; the same for teacher and student")
    alpha: Share = option(default=0.5, doc="weight of the label term; 1 ignores the teacher, 0 ignores the labels")
    confidence: Confidence = option(
        default="none",
        doc='weight of an unlabeled image in the soft targets: 1 ("none"), the teacher\'s top probability ("top"), or '
        '1 - its entropy / log K ("entropy"); not in the paper',
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"temperature": 4.0, "alpha": 0.1},  # RepDistiller and mdistiller, every pair
        "imagenet": {"temperature": 1.0, "alpha": 0.5},  # mdistiller
    }

    @property
    def label_weight(self) -> float:
        return self.alpha

    @property
    def soft_temperature(self) -> float | None:
        return self.temperature if self.confidence == "none" else None  # which is read at temperature 1

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if self.confidence == "none":
            loss = kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        else:
            weights = confidence_weights(teacher.logits, batch.labels, self.confidence)
            divergence = softened_kl(student.logits, teacher.logits, self.temperature)
            loss = self.temperature**2 * (weights * divergence).mean()
        return {"kd": (1 - self.alpha) * loss}
