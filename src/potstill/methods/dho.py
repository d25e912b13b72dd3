"""Dual-head optimisation: one head for labels and one for the teacher on shared features, combined for predictions.

Kang, Lee, Jang and Hwang, "Simple yet Effective Semi-supervised Knowledge Distillation from Vision-Language Models via
Dual-Head Optimization", preprint 2025.  https://arxiv.org/abs/2505.07675
Made for few labels and many unlabeled images (``data.unlabeled``).  The deployed network is the student with both
heads: its logits are the logarithm of ``alpha * softmax(z_ce) + (1 - alpha) * softmax(z_kd / beta)``.  As released, the
soft targets have T = 2 and the factor T squared, and labeled and unlabeled images give a mean each, which are added.

Traps:
- The release chooses alpha and beta on val for every data set but ImageNet, where both are 0.5; so does a run with
  ``alpha: null`` and ``beta: null``, once, after training.  Before, and without a run, they are 0.5 and 1.
- Its code for few labels halves both terms (``balance: 0.5``), that for 1 and 10 % of ImageNet gives each the weight 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.student_surgery import DualHead, ModifiedStudent
from potstill.methods.base import Method, NetworkInfo
from potstill.methods.numerics import Confidence, confidence_weights, softened_kl
from potstill.methods.requirements import Requirements
from potstill.options import Positive, Share, checked, option
from potstill.types import UNLABELED, Batch, Outputs

ALPHAS = tuple(step / 20 for step in range(21))  # candidates of the release, for val
BETAS = (1.0, 0.5, 0.75, 1.25, 1.5, 2.0, 4.0)  # likewise; the first is used while training


@checked
def dho_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 2.0,
    confidence: Confidence = "none",
) -> Tensor:
    r"""Soft targets of labeled and of unlabeled images: the sum of the two means.

    .. math:: \frac{T^2}{|L|} \sum_{b \in L} \mathrm{KL}_b + \frac{T^2}{|U|} \sum_{b \in U} \mathrm{KL}_b, \quad
        \mathrm{KL}_b = \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_{kd} / T)\big)

    Args:
        student_logits: [B, K], of the student's head for the teacher.
        teacher_logits: [B, K].
        labels: [B], int64; -100: unlabeled.
        confidence: weight of an unlabeled image; see ``confidence_weights``.

    Returns:
        A scalar, at least 0; the mean of images of which there are none is 0.

    Example:
        >>> teacher = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
        >>> # as in kd_loss, 1.3113 for the labeled image; (1.3113 + 0) / 2 for the others
        >>> dho_loss(torch.zeros(3, 2), teacher, torch.tensor([0, -100, -100]), temperature=2.0)
        tensor(1.9669)
    """
    divergence = confidence_weights(teacher_logits, labels, confidence) * softened_kl(
        student_logits, teacher_logits, temperature
    )
    unlabeled = (labels == UNLABELED).to(divergence.dtype)
    means = [(divergence * chosen).sum() / chosen.sum().clamp(min=1) for chosen in (1 - unlabeled, unlabeled)]
    return temperature**2 * torch.stack(means).sum()


class DHO(Method):
    """Labels for one head, soft targets for the other: ``balance * CE + (1 - balance) * DHO``."""

    name = "dho"
    needs = Requirements(student_head=True)

    balance: Share = option(default=0.5, doc="weight of the label term, through the label head (the paper's lambda)")
    temperature: Positive = option(default=2.0, doc="T of the soft targets")
    alpha: Share | None = option(
        default=None,
        doc="weight of the label head's probabilities in the prediction; null: chosen on val (0, 0.05, ..., 1)",
    )
    beta: Positive | None = option(
        default=None,
        doc="temperature of the teacher's head in the prediction; null: chosen on val (0.5, 0.75, ..., 4)",
    )
    confidence: Confidence = option(
        default="none",
        doc='weight of an unlabeled image: 1 ("none"), the teacher\'s top probability ("top"), or 1 - its entropy / '
        'log K ("entropy")',
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"imagenet": {"alpha": 0.5, "beta": 0.5}}  # 1 and 10 % of the labels

    @property
    def label_weight(self) -> float:
        return self.balance

    def for_teachers(self, shares: Sequence[float]) -> Method:
        self.student_taps = ()  # of a student that was remodelled before
        self.needs = type(self).needs
        return self

    def modify_student(self, student: nn.Module, student_side: NetworkInfo, teacher_side: NetworkInfo) -> nn.Module:
        if isinstance(student, ModifiedStudent):
            raise UsageError(
                f"dho cannot change a network that was changed already ({student.name}); use one such method"
            )
        head = student_side.outputs.head
        assert head is not None  # declared in `needs`
        path = next(
            path
            for path, module in student.named_modules()
            if isinstance(module, nn.Linear) and module.weight is head.weight
        )
        dual = DualHead(
            student,
            head=path,
            alpha=0.5 if self.alpha is None else self.alpha,
            beta=BETAS[0] if self.beta is None else self.beta,
        )
        dual.candidates = (
            ALPHAS if self.alpha is None else (self.alpha,),
            BETAS if self.beta is None else (self.beta,),
        )
        self.student_taps = dual.taps
        self.needs = replace(self.needs, student_head=False)  # the new network has two
        return dual

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        if self.label_weight == 0:
            return {}
        return {"ce": self.label_weight * self.label_loss(student.features[self.student_taps[0]], batch.targets)}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = dho_loss(
            student.features[self.student_taps[1]],
            teacher.logits,
            batch.labels,
            temperature=self.temperature,
            confidence=self.confidence,
        )
        return {"dho": (1 - self.balance) * loss}
