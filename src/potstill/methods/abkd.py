"""Alpha-beta divergence: a family between forward and reverse KL, with the Hellinger distance among its members.

Wang, Yang, Wang, Wang, Xu and Huang, "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
Distillation via alpha-beta-Divergence", ICML 2025.  https://arxiv.org/abs/2505.04560
Where alpha, beta or their sum is 0 the formula is a limit.  Default is the limit; the release divides by that one
parameter once and not twice, so its value there is ours times the parameter.  Elsewhere both agree.  No factor T
squared: the weight, which the authors tune for each pair of networks together with alpha and beta, makes up for it.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def abkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.8,
    beta: float = 0.3,
    temperature: Positive = 4.0,
) -> Tensor:
    r"""Alpha-beta divergence from teacher to student; batch mean.

    .. math:: -\frac{1}{\alpha \beta} \sum_k p_k^\alpha q_k^\beta - \frac{\alpha}{\alpha + \beta} p_k^{\alpha + \beta}
        - \frac{\beta}{\alpha + \beta} q_k^{\alpha + \beta}, \quad
        p = \mathrm{softmax}(z_t / T), \; q = \mathrm{softmax}(z_s / T)

    (1, 0) is KL from teacher to student, (0, 1) from student to teacher, (0, 0) half the squared difference of the
    log-probabilities, (1/2, 1/2) four times Hellinger's squared distance.  Negative values divide by probabilities and
    overflow where a network is very sure.

    Args:
        student_logits, teacher_logits: [B, K].
        alpha: power of the teacher's probabilities.
        beta: power of the student's.
        temperature: T > 0 of both.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()
        >>> abkd_loss(torch.zeros(1, 2), teacher, alpha=1.0, beta=0.0, temperature=1.0)  # KL: 3/4 ln(3/2) + 1/4 ln(1/2)
        tensor(0.1308)
        >>> abkd_loss(torch.zeros(1, 2), teacher, alpha=1.0, beta=1.0, temperature=1.0)  # (1/16 + 1/16) / 2
        tensor(0.0625)
    """
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    return _divergence(teacher, student, alpha, beta).sum(dim=1).mean()


def _divergence(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    """Class by class, of log-probabilities."""
    total = alpha + beta
    if alpha == 0 and beta == 0:
        return (q - p).square() / 2
    if beta == 0:
        return _towards_kl(p, q, alpha)
    if alpha == 0:
        return _towards_kl(q, p, beta)
    if total == 0:
        ratio = alpha * (p - q)
        return (ratio.expm1() - ratio) / alpha**2
    mixed = (alpha * p + beta * q).exp()
    return (alpha / total * (total * p).exp() + beta / total * (total * q).exp() - mixed) / (alpha * beta)


def _towards_kl(p: Tensor, q: Tensor, power: float) -> Tensor:
    first, second = (power * p).exp(), (power * q).exp()
    return (first * power * (p - q) - first + second) / power**2


class ABKD(Method):
    """Labels and the alpha-beta divergence: ``CE + weight * AB(alpha, beta)``."""

    name = "abkd"

    alpha: float = option(default=0.8, doc="power of the teacher's probabilities")
    beta: float = option(default=0.3, doc="power of the student's")
    temperature: Positive = option(default=4.0, doc="T of both")
    weight: NonNegative = option(default=32.0, doc="weight of the divergence")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet56-resnet20": {"alpha": 0.8, "beta": 0.3, "weight": 32.0},
    }

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = abkd_loss(student.logits, teacher.logits, alpha=self.alpha, beta=self.beta, temperature=self.temperature)
        return {"abkd": self.weight * loss}
