"""KL divergence of softened class probabilities, exact at any temperature.

At a temperature T both softmaxes are nearly uniform, and the divergence is about Var(z_s - z_t) / (2 T^2): the
difference of two logarithms of size log K, of which float32 keeps seven digits.  Times T^2 that is noise from T = 1000
on.  Where the shift between the two is small, a series in the shift itself is used instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.methods.pieces.target_class import target_or_not, without_target
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
    series, small = _series(teacher_log_probs.exp(), (student - teacher) / temperature)
    return torch.where(small, series, divergence)


def softened_target_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The same of "the labelled class" against "any other": [B, K], [B, K] and class ids [B] -> [B].

    Example:
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()
        >>> softened_target_kl(torch.zeros(1, 2), teacher, torch.tensor([0]), 1.0)  # 3/4 ln(3/2) + 1/4 ln(1/2)
        tensor([0.1308])
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    teacher_log_probs = target_or_not(teacher / temperature, labels)
    divergence = F.kl_div(
        target_or_not(student / temperature, labels), teacher_log_probs, reduction="none", log_target=True
    ).sum(dim=1)
    if temperature < HOT:
        return divergence
    shift = (student - teacher) / temperature
    among = F.softmax(without_target(teacher, labels) / temperature, dim=1)
    rest = without_target(shift, labels)
    # By how much the logarithm of the others' sum is shifted.
    mean = (among * rest).sum(dim=1)
    excess, small = _series(among, rest)
    both = torch.stack([shift.gather(1, labels[:, None]).squeeze(1), mean + excess], dim=1)
    series, small_too = _series(teacher_log_probs.exp(), both)
    return torch.where(small & small_too, series, divergence)


def _series(probabilities: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``log(sum p exp(d - mean))`` of small shifts d [B, K], and which rows are small: both [B]."""
    shift = shift - (probabilities * shift).sum(dim=1, keepdim=True)
    small = shift.detach().abs().amax(dim=1, keepdim=True) < SMALL
    # Rows that are not small are left out before they overflow, lest their gradient be NaN.
    found = (probabilities * _excess(torch.where(small, shift, 0.0))).sum(dim=1).log1p()
    return found, small.squeeze(1)


def _excess(shift: Tensor) -> Tensor:
    """``exp(d) - 1 - d`` for small d, by its series up to d^10."""
    factor = 1 + shift / 10
    for divisor in range(9, 2, -1):
        factor = 1 + shift / divisor * factor
    return shift.square() / 2 * factor
