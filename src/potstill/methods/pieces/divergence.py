"""KL divergence of softened class probabilities, exact at any temperature.

At a temperature T both softmaxes are nearly uniform, and the divergence is about Var(z_s - z_t) / (2 T^2): the
difference of two logarithms of size log K, of which float32 keeps seven digits.  Times T^2 that is noise from T = 1000
on.  Where the shift between the two is small, a series in the shift itself is used instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.precision import at_least_float32

HOT = 8.0  # temperature below which the difference of logarithms is exact to 1e-5
SMALL = 0.5  # shifts up to here are summed by the series, whose first term left out is below 1e-8 of it


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``KL(softmax(z_t / T) || softmax(z_s / T))`` of each row.

    With p the teacher's probabilities and d = (z_s - z_t) / T, less its mean under p, it is ``log(sum p exp(d))``,
    which is ``log(1 + sum p (exp(d) - 1 - d))``.

    Args:
        student_logits: shape [B, K].
        teacher_logits: shape [B, K]; no gradient reaches them.
        temperature: T > 0; a tensor gets gradients, and may be of shape [B, 1].

    Returns:
        Shape [B], at least 0, in at least float32.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]])
        >>> softened_kl(torch.zeros(1, 2), logits, 2.0)  # 0.8808 ln(0.8808 / 0.5) + 0.1192 ln(0.1192 / 0.5)
        tensor([0.3278])
        >>> 1e12 * softened_kl(torch.zeros(1, 2), logits, 1e6)  # the variance of (4, 0), over 2
        tensor([2.0000])
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    teacher_log_probs = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1), teacher_log_probs, reduction="none", log_target=True
    ).sum(dim=1)
    if not isinstance(temperature, Tensor) and temperature < HOT:
        return divergence
    probabilities = teacher_log_probs.exp()
    shift = (student - teacher) / temperature
    shift = shift - (probabilities * shift).sum(dim=1, keepdim=True)
    small = shift.detach().abs().amax(dim=1, keepdim=True) < SMALL
    series = (probabilities * _excess(torch.where(small, shift, 0.0))).sum(dim=1).log1p()
    return torch.where(small.squeeze(1), series, divergence)


def _excess(shift: Tensor) -> Tensor:
    """``exp(d) - 1 - d`` for small d, by its series up to d^10."""
    factor = 1 + shift / 10
    for divisor in range(9, 2, -1):
        factor = 1 + shift / divisor * factor
    return shift.square() / 2 * factor
