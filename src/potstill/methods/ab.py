"""AB: match which neurons are active, by the signs of their values before the activation, in a phase before the labels.

Heo, Lee, Yun and Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
AAAI 2019.  https://arxiv.org/abs/1811.03233
The published CIFAR numbers train on boundaries alone for 30 epochs, then on labels alone for 240: ``init_share`` is the
first part's share of a run.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.features import Projection, pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, Share, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def ab_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, margin: Positive = 1.0) -> Tensor:
    r"""Squared hinge on the sign of the teacher's values: summed over a map, averaged over the batch.

    .. math:: \frac{3}{1000} \sum_{i=1}^n \frac{2^{i-n}}{B} \sum
        \begin{cases} \max(0, s + \mu)^2 & t \le 0 \\ \max(0, \mu - s)^2 & t > 0 \end{cases}

    Args:
        student_maps: each of [B, C, H, W], before activation and after its connector.
        teacher_maps: of the same shapes, before activation.
        margin: :math:`\mu`, margin beyond 0 that the student must reach.

    Example:
        >>> student, teacher = torch.tensor([1.0, -3.0]).view(1, 1, 1, 2), torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2)
        >>> ab_loss([student], [teacher])  # 0.003 ((1 + 1)^2 + (1 + 3)^2)
        tensor(0.0600)
    """
    terms = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student = at_least_float32(student)
        missing = torch.where(teacher.detach() > 0, margin - student, student + margin).clamp(min=0)
        terms.append(missing.square().sum() / len(student))
    return 0.003 * torch.stack([term / 2 ** (len(terms) - 1 - position) for position, term in enumerate(terms)]).sum()


class AB(Method):
    """First boundaries, then labels: ``weight * AB`` in the first epochs, ``CE`` in the others."""

    name = "ab"

    weight: NonNegative = option(default=1.0, doc="weight of the boundaries")
    margin: Positive = option(default=1.0, doc="margin beyond 0 that the student's values must reach")
    init_share: Share = option(
        default=0.111,
        doc="share of the epochs that come before labels; the authors' 30 of 270. 0, or a run of one epoch: labels "
        "and boundaries together throughout.",
    )
    ce_weight: Positive = option(
        default=1.0, doc="weight of the label term; above 0, as nothing else is left after the first part"
    )

    def __post_init__(self) -> None:
        self.needs = Requirements(maps="pairs", before_activation="both", epoch=self.init_share > 0)

    @property
    def staged(self) -> bool:
        return self.init_share > 0

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        pairs = zip(student.outputs.maps, teacher.outputs.maps, strict=True)
        self.connectors = nn.ModuleList(_connector(ours.shape, theirs.shape) for ours, theirs in pairs)

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        _, labels = active_terms(self.init_share, self)
        return super().label_terms(student, batch) if labels else {}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        boundaries, _ = active_terms(self.init_share, self)
        if not boundaries:
            return {}
        connected = [join(features) for join, features in zip(self.connectors, student.maps, strict=True)]
        pairs = [pool_to_common_size(ours, theirs) for ours, theirs in zip(connected, teacher.maps, strict=True)]
        loss = ab_loss([ours for ours, _ in pairs], [theirs for _, theirs in pairs], margin=self.margin)
        return {"boundaries": self.weight * loss}


def active_terms(init_share: float, method: Method) -> tuple[bool, bool]:
    """Whether the teacher and whether the labels count in this epoch of a method that has two stages.

    The first stage has ``init_share`` of all epochs, rounded up, but never all of them: a run of one epoch has no
    stages.

    Example:
        >>> method = Method()
        >>> method.start_epoch(29, 270)
        >>> active_terms(0.111, method)
        (True, False)
        >>> method.start_epoch(30, 270)
        >>> active_terms(0.111, method)
        (False, True)
    """
    if init_share == 0 or method.epochs == 1:
        return True, True
    epoch, epochs = method.progress, method.epochs or 1
    first = min(math.ceil(init_share * epochs - 1e-9), epochs - 1)
    return epoch < first, epoch >= first


def _connector(ours: Sequence[int], theirs: Sequence[int]) -> nn.Module:
    """Nothing where the shapes are equal, as released; else to the teacher's channels, without a ReLU."""
    if ours[1:] == theirs[1:]:
        return nn.Identity()
    return Projection(ours, theirs, norm=True)
