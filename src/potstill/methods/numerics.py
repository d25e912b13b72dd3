"""Building blocks of the losses of several papers: exact in half precision, at any temperature and however sure a
network is.

Target class: a probability of 1 - p, computed so, is 0 once p rounds to 1, and its logarithm infinite.  Here the other
classes are summed in log space, so that every logarithm stays finite.

Divergence: at a temperature T both softmaxes are nearly uniform, and the divergence is about Var(z_s - z_t) / (2 T^2):
the difference of two logarithms of size log K, of which float32 keeps seven digits.  Times T^2 that is noise from
T = 1000 on.  Where the shift between the two is small, a series in the shift itself is used instead.

Relations: inner products of a batch in at least float32, also within autocast, and the checks of shapes.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.types import UNLABELED, at_least_float32


def drop_target(logits: Tensor, targets: Tensor) -> Tensor:
    """The other classes' logits in their order: [B, K] and class ids [B] -> [B, K - 1].

    Example:
        >>> drop_target(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
        tensor([[1., 3.]])
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, others + (others >= targets[:, None]))


def binary_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of "the target class" and "any other": [B, K] and class ids [B] -> [B, 2].

    Example:
        >>> binary_log_probs(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2])).exp()
        tensor([[0.2500, 0.7500]])
        >>> binary_log_probs(torch.tensor([[900.0, 0.0]]), torch.tensor([0]))
        tensor([[   0., -900.]])
    """
    target = logits.gather(1, targets[:, None])
    rest = drop_target(logits, targets).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([target, rest], dim=1), dim=1)


def require_three_classes(method: str, classes: int) -> None:
    """Refuse methods that compare the classes other than the target where there is only one of those."""
    if classes < 3:
        raise UsageError(
            f"{method} compares the classes other than the labelled one, and of {classes} classes only one is left: "
            "that term would always be 0. Use method kd"
        )


SERIES_MIN_TEMPERATURE = 8.0  # temperature below which the difference of logarithms is exact to 1e-5
SERIES_MAX_SHIFT = 0.5  # shifts up to here are summed by the series, whose first term left out is below 1e-8 of it


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``KL(softmax(z_t / T) || softmax(z_s / T))`` of each row.

    With p the teacher's probabilities and d = (z_s - z_t) / T, less its mean under p, it is ``log(sum p exp(d))``,
    which is ``log(1 + sum p (exp(d) - 1 - d))``.

    Logits are [B, K]; T > 0 may be a tensor [B, 1], which gets gradients.  [B], at least 0, in at least float32.

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
    if not isinstance(temperature, Tensor) and temperature < SERIES_MIN_TEMPERATURE:
        return divergence
    series, small = _log_mean_exp_series(teacher_log_probs.exp(), (student - teacher) / temperature)
    return torch.where(small, series, divergence)


def softened_target_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The same of "the labelled class" against "any other": [B, K], [B, K] and class ids [B] -> [B].

    Example:
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()
        >>> softened_target_kl(torch.zeros(1, 2), teacher, torch.tensor([0]), 1.0)  # 3/4 ln(3/2) + 1/4 ln(1/2)
        tensor([0.1308])
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    teacher_log_probs = binary_log_probs(teacher / temperature, labels)
    divergence = F.kl_div(
        binary_log_probs(student / temperature, labels), teacher_log_probs, reduction="none", log_target=True
    ).sum(dim=1)
    if temperature < SERIES_MIN_TEMPERATURE:
        return divergence
    shift = (student - teacher) / temperature
    among = F.softmax(drop_target(teacher, labels) / temperature, dim=1)
    rest = drop_target(shift, labels)
    # By how much the logarithm of the others' sum is shifted.
    mean = (among * rest).sum(dim=1)
    excess, small = _log_mean_exp_series(among, rest)
    both = torch.stack([shift.gather(1, labels[:, None]).squeeze(1), mean + excess], dim=1)
    series, small_too = _log_mean_exp_series(teacher_log_probs.exp(), both)
    return torch.where(small & small_too, series, divergence)


def _log_mean_exp_series(probabilities: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``log(sum p exp(d - mean))`` of small shifts d [B, K], and which rows are small: both [B]."""
    shift = shift - (probabilities * shift).sum(dim=1, keepdim=True)
    small = shift.detach().abs().amax(dim=1, keepdim=True) < SERIES_MAX_SHIFT
    # Rows that are not small are left out before they overflow, lest their gradient be NaN.
    found = (probabilities * _exp_remainder(torch.where(small, shift, 0.0))).sum(dim=1).log1p()
    return found, small.squeeze(1)


def _exp_remainder(shift: Tensor) -> Tensor:
    """``exp(d) - 1 - d`` for small d, by its series up to d^10."""
    factor = 1 + shift / 10
    for divisor in range(9, 2, -1):
        factor = 1 + shift / divisor * factor
    return shift.square() / 2 * factor


Confidence = Literal["none", "top", "entropy"]


def confidence_weights(teacher_logits: Tensor, labels: Tensor, kind: Confidence) -> Tensor:
    """Return the weight [B] of each image in the soft targets; labeled images count 1.

    Args:
        teacher_logits: [B, K].
        labels: [B], int64; -100: unlabeled.
        kind: weight of an unlabeled image: "none": 1; "top": the teacher's top probability; "entropy": 1 - H / log
            K, with H the entropy of its probabilities.  All of them at temperature 1.

    Example:
        >>> logits, labels = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), torch.tensor([-100, -100])
        >>> confidence_weights(logits, labels, "top"), confidence_weights(logits, labels, "entropy")
        (tensor([0.7500, 0.5000]), tensor([0.1887, 0.0000]))
    """
    logs = F.log_softmax(at_least_float32(teacher_logits.detach()), dim=1)
    if kind == "none":
        return torch.ones_like(logs[:, 0])
    probabilities = logs.exp()
    if kind == "top":
        weights = probabilities.amax(dim=1)
    else:
        weights = (1 + (probabilities * logs).sum(dim=1) / math.log(logs.shape[1])).clamp(0, 1)
    return torch.where(labels == UNLABELED, weights, 1.0)


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return inner products [.., M, N] of the rows of [.., M, D] and [.., N, D] in at least float32, also within
    autocast, where bfloat16 would lose the differences of two nearly equal similarities.

    Example:
        >>> inner_products(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[11.,  2.]])
    """
    with torch.autocast(left.device.type, enabled=False):
        return at_least_float32(left) @ at_least_float32(right).transpose(-1, -2)


def require_two_images(features: Tensor, method: str) -> None:
    """Refuse a batch of one image, which has no relations."""
    if len(features) < 2:
        raise UsageError(
            f"{method} compares the images of a batch with each other: it needs 2 or more, got {len(features)}; "
            "raise the batch size or drop the last, smaller batch (methods without relations, such as kd, take 1)"
        )


def require_equal_shapes(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuse two features of unequal shapes, which a loss would subtract."""
    if student.shape != teacher.shape:
        raise UsageError(
            f"{what} of student and teacher must have one shape, got {list(student.shape)} and {list(teacher.shape)}"
        )
