"""CRLD: match the logits of two views, within and across views, on images where the teacher is confident.

Zhang, Liu, Cai and Ma, "Cross-View Consistency Regularisation for Knowledge Distillation", ACM Multimedia 2024.
https://arxiv.org/abs/2412.16493
One form: the released one.  The teacher's confidence in the usual view decides over both terms within views, its
confidence in the strong view over both across views; images that are left out still count in the mean.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import softened_kl
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, Share, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def crld_within_loss(
    student_weak: Tensor,
    student_strong: Tensor,
    teacher_weak: Tensor,
    teacher_strong: Tensor,
    *,
    temperature: Positive = 4.0,
    threshold: Share = 0.9,
) -> Tensor:
    r"""Divergence from the teacher within each view, on images where it is confident in the usual view.

    .. math:: \frac{1}{B} \sum_b \big[\max p^w_b \ge \tau\big] \,
        \big(\ell(z_s^w, z_t^w)_b + \ell(z_s^s, z_t^s)_b\big),
        \quad \ell(a, c) = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(c / T) \,\|\, \mathrm{softmax}(a / T)\big)

    Args:
        student_weak: [B, K], of the usual view.
        student_strong: [B, K], of the strongly augmented one.
        teacher_weak: [B, K].
        teacher_strong: [B, K].
        temperature: T > 0 of the divergence.
        threshold: least probability (at T = 1) that the teacher gives its first class in the usual view.

    Example:
        >>> import torch
        >>> flat, sure = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> # the teacher's 3/4 suffices: 3/4 ln(3/2) + 1/4 ln(1/2) in the usual view, 0 in the strong one
        >>> crld_within_loss(flat, flat, sure, flat, temperature=1.0, threshold=0.7)
        tensor(0.1308)
        >>> crld_within_loss(flat, flat, sure, flat, temperature=1.0, threshold=0.8)
        tensor(0.)
    """
    both = _divergence(student_weak, teacher_weak, temperature) + _divergence(
        student_strong, teacher_strong, temperature
    )
    return (both * _sure(teacher_weak, threshold)).mean()


@checked
def crld_cross_loss(
    student_weak: Tensor,
    student_strong: Tensor,
    teacher_weak: Tensor,
    teacher_strong: Tensor,
    *,
    temperature: Positive = 4.0,
    threshold: Share = 0.2,
) -> Tensor:
    r"""Divergence from the teacher's logits of the other view, on images where it is confident in the strong view.

    .. math:: \frac{1}{B} \sum_b \big[\max p^s_b \ge \tau\big] \,
        \big(\ell(z_s^s, z_t^w)_b + \ell(z_s^w, z_t^s)_b\big)

    Args:
        student_weak: [B, K], of the usual view.
        student_strong: [B, K], of the strongly augmented one.
        teacher_weak: [B, K].
        teacher_strong: [B, K].
        temperature: T > 0 of the divergence.
        threshold: least probability (at T = 1) that the teacher gives its first class in the strong view.

    Example:
        >>> import torch
        >>> flat, sure = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> # strong student against the usual view's (3/4, 1/4); the strong view's 1/2 suffices
        >>> crld_cross_loss(flat, flat, sure, flat, temperature=1.0, threshold=0.5)
        tensor(0.1308)
    """
    both = _divergence(student_strong, teacher_weak, temperature) + _divergence(
        student_weak, teacher_strong, temperature
    )
    return (both * _sure(teacher_strong, threshold)).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """[B]."""
    return temperature**2 * softened_kl(student, teacher, temperature)


def _sure(teacher: Tensor, threshold: float) -> Tensor:
    return F.softmax(at_least_float32(teacher.detach()), dim=1).max(dim=1).values >= threshold


class CRLD(Method):
    """Labels and logits of two views: ``ce_weight * CE + within_weight * within + cross_weight * across``.

    ``ce_weight`` counts in both views; the strong view's cross-entropy is the term ``ce_strong``.
    """

    name = "crld"
    needs = Requirements(second="strong", labels=True)

    temperature: Positive = option(default=4.0, doc="T of every divergence")
    within_weight: NonNegative = option(default=2.0, doc="weight of the divergences within views")
    cross_weight: NonNegative = option(default=0.5, doc="weight of the divergences across views")
    weak_threshold: Share = option(
        default=0.9, doc="the teacher's least confidence in the usual view, for divergences within views"
    )
    strong_threshold: Share = option(
        default=0.2, doc="its least confidence in the strong view, for divergences across views"
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term, in each view")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {
            "temperature": 4.0,
            "within_weight": 2.0,
            "cross_weight": 0.5,
            "weak_threshold": 0.9,
            "strong_threshold": 0.2,
        },
        "imagenet": {"temperature": 1.0, "ce_weight": 2.0},
    }

    @property
    def label_term_names(self) -> frozenset[str]:
        return frozenset({"ce", "ce_strong"})

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.second is not None
        assert teacher.second is not None
        views = (student.logits, student.second.logits, teacher.logits, teacher.second.logits)
        within = crld_within_loss(*views, temperature=self.temperature, threshold=self.weak_threshold)
        across = crld_cross_loss(*views, temperature=self.temperature, threshold=self.strong_threshold)
        return {
            "ce_strong": self.ce_weight * self.label_loss(student.second.logits, batch.targets),
            "within": self.within_weight * within,
            "across": self.cross_weight * across,
        }
