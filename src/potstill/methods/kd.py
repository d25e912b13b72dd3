"""Knowledge distillation: match the teacher's softened class probabilities.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014.
https://arxiv.org/abs/1503.02531
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.options import Positive, Share, checked
from potstill.precision import at_least_float32
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
    student_log_probs = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher_log_probs = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


class KD(Method):
    """Labels and soft targets: ``alpha * CE + (1 - alpha) * KD``.

    Args:
        temperature: T of the soft targets; the same for teacher and student.
        alpha: weight of the label term; 1 ignores the teacher, 0 ignores the labels.  (The paper's experiments and
            RepDistiller's CIFAR protocol give labels the weight 0.1 at T = 4.)
    """

    @checked
    def __init__(self, *, temperature: Positive = 2.0, alpha: Share = 0.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None  # needs_teacher: the Distiller has seen to it
        return {
            "ce": self.alpha * self.label_loss(student.logits, batch.labels),
            "kd": (1 - self.alpha) * kd_loss(student.logits, teacher.logits, temperature=self.temperature),
        }
