"""WKD-L: match probabilities by optimal transport, where moving between similar classes costs little.

Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024.
https://arxiv.org/abs/2412.08139
Two classes are as near as their rows in the teacher's last linear layer are alike (the release's choice "fc"; its
other, a file of kernel alignments made beforehand, is left out).  As released, the target class is a term of its own,
the gradient runs through all steps of Sinkhorn's iteration, and there is no factor T squared.  The CIFAR preset lets
the distance fade after epoch 150, as the authors do.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products, require_three_classes
from potstill.methods.requirements import Requirements
from potstill.options import Count, Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32

EPSILON = 1e-8  # added to costs and to every sum that is divided by, as released


@checked
def wkd_cost(rows: Tensor, *, sharpness: NonNegative = 1.0) -> Tensor:
    r"""Cost of carrying probability between classes, from one vector for each.

    .. math:: 1 - \exp\big(-\kappa (1 - \cos(v_i, v_j))\big)

    Args:
        rows: shape [K, D]; no gradient reaches them.
        sharpness: :math:`\kappa`; 0 leaves the cosine distance as it is.

    Returns:
        Shape [K, K].

    Raises:
        UsageError: ``sharpness`` is below 0.

    Example:
        >>> wkd_cost(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # right angles: 1 - exp(-1)
        tensor([[0.0000, 0.6321],
                [0.6321, 0.0000]])
    """
    units = F.normalize(at_least_float32(rows.detach()), dim=1)
    distance = 1 - inner_products(units, units)
    return 1 - torch.exp(-sharpness * distance) if sharpness > 0 else distance


def wkd_target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of the labelled class alone, weighted by the teacher's probability of it; batch mean.

    .. math:: -\frac{1}{B} \sum_b \mathrm{softmax}(z_t)_{by} \log \mathrm{softmax}(z_s)_{by}

    Logits are [B, K], ``labels`` int64 [B] class ids.

    Example:
        >>> # 3/4 ln 2
        >>> wkd_target_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
        tensor(0.5199)
    """
    target_probability = F.softmax(at_least_float32(teacher_logits.detach()), dim=1).gather(1, labels[:, None])
    return -(
        target_probability * F.log_softmax(at_least_float32(student_logits), dim=1).gather(1, labels[:, None])
    ).mean()


@checked
def wkd_distance_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    cost: Tensor,
    *,
    temperature: Positive = 8.0,
    regularization: Positive = 0.05,
    steps: Count = 10,
) -> Tensor:
    r"""Cost of the plan that carries the student's probabilities of the other classes to the teacher's; batch mean.

    .. math:: \frac{1}{B} \sum_b \sum_{ij} u_i e^{-C_{ij} / \lambda} v_j \, C_{ij}

    with u and v from Sinkhorn's iteration, through which the gradient runs.  The labelled class is given no probability
    on either side: that leaves it out of every sum, without a [B, K - 1, K - 1] of costs.

    Args:
        student_logits: [B, K], K of 3 or more.
        teacher_logits: [B, K].
        labels: [B], int64 class ids.
        cost: C, shape [K, K]; what is below 0 counts as 0.
        temperature: T > 0 of both probabilities.
        regularization: lambda > 0; smaller is nearer to the true distance, and needs more steps.
        steps: of the iteration.

    Example:
        >>> # half of the probability goes from class 2 to class 1, at the cost 0.4
        >>> student, teacher = torch.tensor([[0.0, 1.0, 1.0]]).log(), torch.tensor([[0.0, 1.0, 0.0]]).log()
        >>> cost = 0.4 * (1 - torch.eye(3))
        >>> wkd_distance_loss(student, teacher, torch.tensor([0]), cost, temperature=1.0)
        tensor(0.2000)
    """
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    ours, theirs = (
        F.softmax((at_least_float32(logits) / temperature).masked_fill(target, -torch.inf), dim=1)
        for logits in (student_logits, teacher_logits.detach())
    )
    cost = cost.detach().to(ours.dtype).clamp(min=0) + EPSILON
    kernel = torch.exp(-cost / regularization)
    left = (~target).to(ours.dtype) / (ours.shape[1] - 1)
    right = left
    for _ in range(steps):
        right = theirs / (inner_products(left, kernel.T) + EPSILON)
        left = ours / (inner_products(right, kernel) + EPSILON)
    return (left * inner_products(right, kernel * cost)).sum(dim=1).mean()


class WKDL(Method):
    """Labels, target class and transport of the others: ``CE + weight * target + gamma * transport``.

    Traps:
        Two classes are refused: without the target class only one is left, and nothing is carried.
    """

    name = "wkd_l"

    weight: NonNegative = option(default=1.0, doc="weight of the target class")
    gamma: NonNegative = option(default=600.0, doc="weight of the transport")
    temperature: Positive = option(default=8.0, doc="T of the transport; the target class is taken at 1")
    sharpness: NonNegative = option(default=1.0, doc="kappa of the cost", fixed=True)
    regularization: Positive = option(default=0.05, doc="lambda of Sinkhorn's iteration")
    steps: Count = option(default=10, doc="steps of Sinkhorn's iteration")
    fade_after: Epochs | None = option(
        default=None, doc="from this epoch on, gamma falls to 0 along a half cosine; None: never"
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet32x4-resnet8x4": {"gamma": 600.0, "temperature": 8.0, "sharpness": 1.0, "fade_after": 150},
        "imagenet/resnet34-resnet18": {"gamma": 30.0, "temperature": 2.0, "sharpness": 1.0},
        "imagenet/resnet50-mobilenetv1": {"gamma": 25.0, "temperature": 2.0, "sharpness": 2.0},
    }

    def __post_init__(self) -> None:
        self.needs = Requirements(teacher_head=True, labels=True, epoch=self.fade_after is not None)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert teacher.outputs.head is not None
        require_three_classes("wkd_l", training.classes)
        self.cost: Tensor
        self.register_buffer("cost", wkd_cost(teacher.outputs.head.weight, sharpness=self.sharpness))

    @property
    def fading(self) -> float:
        """Factor of the transport in this epoch."""
        if self.fade_after is None:
            return 1.0
        progress, start = self.progress, self.in_epochs("fade_after")
        left = max(1, (self.epochs or 0) - start)
        return (1 + math.cos(math.pi * min(max((progress - start) / left, 0.0), 1.0))) / 2

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        given = (student.logits, teacher.logits, batch.labels)
        distance = wkd_distance_loss(
            *given,
            self.cost,
            temperature=self.temperature,
            regularization=self.regularization,
            steps=self.steps,
        )
        return {"target": self.weight * wkd_target_loss(*given), "transport": self.fading * self.gamma * distance}
