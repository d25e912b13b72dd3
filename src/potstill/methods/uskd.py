"""USKD: no teacher; soft labels from the student's own confidence and from a weak head's ranking of classes.

Yang, Zeng, Li, Zhang, Yuan and Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023.  https://arxiv.org/abs/2303.13005
The weak head reads the mean of the last but one stage's map and is dropped after training.  Default is the paper's
ranking of the other classes by probabilities; the release has put the student's logarithms of probabilities in their
place by then, so that their sum with the weak head's probabilities ranks differently (``form="release"``).
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import drop_target, require_three_classes
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32

EPSILON = 1e-6  # of the authors' ranking
SMOOTHING = 0.1  # of the weak head's labels


def uskd_target_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of the labelled class, more for images of which the student is surer than for others; batch mean.

    .. math:: -\frac{1}{B} \sum_b \Big(q_b^2 + 1 - \frac{1}{B} \sum_{b'} q_{b'}^2\Big) \log q_b,
        \quad q_b = \mathrm{softmax}(z_b)_{y_b}

    Args:
        student_logits: [B, K].
        labels: [B], int64 class ids.

    Returns:
        A scalar, at least 0.  No gradient runs through the weights.

    Example:
        >>> # q = 1/2 and 1/4: weights 1.09375 and 0.90625; (1.09375 ln 2 + 0.90625 ln 4) / 2
        >>> uskd_target_loss(torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log(), torch.tensor([0, 1]))
        tensor(1.0072)
    """
    log_probs = F.log_softmax(at_least_float32(student_logits), dim=1).gather(1, labels[:, None]).squeeze(1)
    squares = log_probs.detach().exp().square()
    return -((squares + 1 - squares.mean()) * log_probs).mean()


def uskd_weak_loss(weak_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of the weak head with labels that are smoothed by a tenth; batch mean.

    Args:
        weak_logits: [B, K].
        labels: [B], int64 class ids.

    Example:
        >>> # targets 0.95 and 0.05: 0.95 ln(4/3) + 0.05 ln 4
        >>> uskd_weak_loss(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
        tensor(0.3426)
    """
    return F.cross_entropy(at_least_float32(weak_logits), labels, label_smoothing=SMOOTHING)


def uskd_others_loss(
    student_logits: Tensor, weak_logits: Tensor, labels: Tensor, *, form: Literal["paper", "release"] = "paper"
) -> Tensor:
    r"""Cross-entropy among the classes other than the label, with targets by Zipf's law of their rank; batch mean.

    .. math:: -\frac{1}{B} \sum_{b, k \ne y} \frac{1 / r_{bk}}{\sum_{j=1}^{K-1} 1 / j}
        \log \mathrm{softmax}(z_{b, \setminus y})_k

    r is the rank, from 1, by the sum of the student's and the weak head's probabilities among the other classes.

    Args:
        student_logits: [B, K], K of 3 or more.
        weak_logits: [B, K].
        labels: [B], int64 class ids.
        form: "release" ranks by the student's log-probabilities in place of probabilities.

    Example:
        >>> # class 0 before class 1 for both: targets 2/3 and 1/3 against (3/4, 1/4)
        >>> student, weak = torch.tensor([[3.0, 1.0, 1.0]]).log(), torch.tensor([[2.0, 1.0, 5.0]]).log()
        >>> uskd_others_loss(student, weak, torch.tensor([2]))
        tensor(0.6539)
    """
    student, weak = at_least_float32(student_logits), at_least_float32(weak_logits.detach())
    log_probs = F.log_softmax(student.detach(), dim=1)
    own = log_probs if form == "release" else log_probs.exp()
    shares = [
        drop_target(each, labels) / (1 - each.gather(1, labels[:, None]) + EPSILON)
        for each in (own, F.softmax(weak, dim=1))
    ]
    score = torch.stack(shares).sum(dim=0)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    zipf = 1 / (rank + 1).to(student.dtype)
    others = F.log_softmax(drop_target(student, labels), dim=1)
    return -(zipf / zipf.sum(dim=1, keepdim=True) * others).sum(dim=1).mean()


class USKD(Method):
    """Labels and soft labels of the student's own: ``CE + alpha * target + beta * others + mu * weak``.

    Traps:
        Two classes are refused: without the labelled one there is nothing to rank.
    """

    name = "uskd"
    needs = Requirements(teacher=False, maps="all", classes=True, labels=True)

    alpha: NonNegative = option(
        default=1.0, doc="weight of the labelled class (the paper's alpha, not that of method kd)"
    )
    beta: NonNegative = option(default=0.1, doc="weight of the other classes")
    mu: NonNegative = option(default=0.005, doc="weight of the weak head's own labels")
    form: Literal["paper", "release"] = option(
        default="paper", doc='"paper" or "release", how the other classes are ranked'
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"alpha": 0.1, "beta": 0.1, "mu": 0.1},
        "imagenet": {"alpha": 1.0, "beta": 0.1, "mu": 0.005},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        require_three_classes("uskd", training.classes)
        self.weak_head = nn.Linear(_weak_map(student.outputs).shape[1], training.classes)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        weak = self.weak_head(_weak_map(student).mean(dim=(2, 3)))
        others = uskd_others_loss(student.logits, weak, batch.labels, form=self.form)
        return {
            "target": self.alpha * uskd_target_loss(student.logits, batch.labels),
            "others": self.beta * others,
            "weak": self.mu * uskd_weak_loss(weak, batch.labels),
        }


def _weak_map(outputs: Outputs) -> Tensor:
    """Of the last but one stage; of the only one, where there is but one."""
    return outputs.maps[-2:][0]
