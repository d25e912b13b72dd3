"""DIST: match by Pearson correlation of probabilities, over the classes of an image and the images of a class.

Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
https://arxiv.org/abs/2205.10536
Paper and release agree: beta = gamma = 2 here is the release's 1 and 1 under an outer weight of 2.  1e-8 is added to
the product of the norms, as in the release: other libraries clamp each norm, and their gradients differ by some per
cent where classes have hardly any probability.
The class-wise part compares the images of a batch (of one device, in distributed training), so it depends on the batch
size.  With two classes the sample-wise part is a constant of the order of the two logits, whose gradient is noise where
they are close, and the class-wise part does not change if all probabilities of a class are shifted: students lost 14
points and more, so ``DIST`` refuses two classes.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


def _mean_distance(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    student = student - student.mean(dim=1, keepdim=True)
    teacher = teacher - teacher.mean(dim=1, keepdim=True)
    correlation = (student * teacher).sum(dim=1) / (student.norm(dim=1) * teacher.norm(dim=1) + eps)
    distance: Tensor = 1 - correlation.mean()
    return distance


@checked
def dist_inter_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive, eps: NonNegative = 1e-8
) -> Tensor:
    r"""Sample-wise part of DIST: how far each image's probabilities are from correlating with the teacher's.

    .. math:: \tau^2 \Big(1 - \frac{1}{B} \sum_i \rho(P^s_{i,:}, P^t_{i,:})\Big), \quad P = \mathrm{softmax}(z / \tau),
        \quad \rho(a, b) = \frac{\langle a - \bar a, b - \bar b \rangle}
        {\lVert a - \bar a \rVert \lVert b - \bar b \rVert + \epsilon}

    Args:
        student_logits, teacher_logits: [B, K].
        temperature: tau > 0.
        eps: added to the product of the norms.

    Returns:
        A scalar from 0 to 2 tau squared.

    Example:
        >>> import torch
        >>> # probabilities (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4): correlation -1/2
        >>> student, teacher = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 1.0]]).log()
        >>> dist_inter_loss(student, teacher, temperature=1.0)
        tensor(1.5000)
    """
    student = F.softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    return temperature**2 * _mean_distance(student, teacher, eps)


@checked
def dist_intra_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive, eps: NonNegative = 1e-8
) -> Tensor:
    r"""Class-wise part of DIST: how far each class's probabilities over the batch are from correlating.

    .. math:: \tau^2 \Big(1 - \frac{1}{K} \sum_k \rho(P^s_{:,k}, P^t_{:,k})\Big)

    A class whose probability is the same for all images counts as uncorrelated.

    Args:
        student_logits: [B, K]; with one image the loss is a constant.
        teacher_logits: [B, K].
        temperature: tau > 0.
        eps: added to the product of the norms.

    Returns:
        A scalar from 0 to 2 tau squared.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the two images the other way round than the teacher
        >>> round(dist_intra_loss(student, student.flip(0), temperature=1.0).item(), 4)
        2.0
    """
    student = F.softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    return temperature**2 * _mean_distance(student.T, teacher.T, eps)


@checked
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Positive = 4.0,
    beta: NonNegative = 2.0,
    gamma: NonNegative = 2.0,
    eps: NonNegative = 1e-8,
) -> Tensor:
    r"""Weighted sum of the sample-wise and the class-wise part.

    .. math:: \beta \, \mathrm{inter} + \gamma \, \mathrm{intra}

    Args:
        student_logits: [B, K]; B of 2 or more.
        teacher_logits: [B, K].
        temperature: tau > 0.
        beta: weight of ``dist_inter_loss``.
        gamma: weight of ``dist_intra_loss``.
        eps: added to the product of the norms.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # every correlation is -1: 2 * 2 + 1 * 2
        >>> round(dist_loss(student, student.flip(0), temperature=1.0, beta=2.0, gamma=1.0).item(), 4)
        6.0
    """
    inter = dist_inter_loss(student_logits, teacher_logits, temperature=temperature, eps=eps)
    intra = dist_intra_loss(student_logits, teacher_logits, temperature=temperature, eps=eps)
    return beta * inter + gamma * intra


class DIST(Method):
    """Labels and correlations: ``CE + beta * inter + gamma * intra``.

    Traps:
        Two classes are refused: the sample-wise part is then constant, and the class-wise part puts the images in
        order, but not into classes.
    """

    name = "dist"
    needs = Requirements(several=True)

    temperature: Positive = option(default=4.0, doc="tau of the softmax; 4 on CIFAR, 1 on ImageNet")
    beta: NonNegative = option(default=2.0, doc="weight of the sample-wise part")
    gamma: NonNegative = option(default=2.0, doc="weight of the class-wise part")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"temperature": 4.0},
        "imagenet": {"temperature": 1.0},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        if training.classes == 2:
            raise UsageError(
                "dist correlates the probabilities of an image over its classes, and those of two classes always "
                "correlate wholly: what is left does not tell the classes apart. Use method kd (without labels: "
                "--method kd --alpha 0)"
            )

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        given = (student.logits, teacher.logits)
        return {
            "inter": self.beta * dist_inter_loss(*given, temperature=self.temperature),
            "intra": self.gamma * dist_intra_loss(*given, temperature=self.temperature),
        }
