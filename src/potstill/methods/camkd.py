"""CA-MKD: weigh several teachers, for each image, by their cross-entropy on its label.

Zhang, Chen and Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022.
https://arxiv.org/abs/2201.00007
As released: both terms are divided by the number of teachers although the weights already sum to 1; the weights of
the feature term carry gradient into the student; and the feature term is left out in the first epoch.  The release
pools the student's map anew for each teacher from what the teacher before left of it; here each reads the whole map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features import Projection, resize_map
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import softened_kl
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


def camkd_weights(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    r"""How far each of M networks is to be trusted on each image: the lower its cross-entropy, the more.

    .. math:: w_{mi} = \frac{1}{M - 1} \Big( 1 - \frac{\exp(\mathrm{CE}_{mi})}{\sum_n \exp(\mathrm{CE}_{ni})} \Big)

    Args:
        logits: M tensors [B, K].  The gradient reaches them.
        labels: [B], int64.

    Returns:
        [M, B]; the M weights of an image sum to 1.

    Raises:
        UsageError: fewer than two networks.

    Example:
        >>> known, unknown = torch.tensor([[0.0, -1e3]]), torch.zeros(1, 2)  # cross-entropies 0 and ln 2
        >>> camkd_weights([known, unknown], torch.tensor([0])).flatten()  # by hand: 1 - 1/3, 1 - 2/3
        tensor([0.6667, 0.3333])
    """
    if len(logits) < 2:
        raise UsageError(f"camkd weighs teachers against each other: it needs 2 or more, got {len(logits)}; use kd")
    losses = [F.cross_entropy(at_least_float32(one), labels, reduction="none") for one in logits]
    return (1 - torch.stack(losses).softmax(dim=0)) / (len(logits) - 1)


@checked
def camkd_logit_loss(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor, *, temperature: Positive = 4.0
) -> Tensor:
    r"""Weighted divergence from each teacher, divided by the number of images and of teachers.

    .. math:: \frac{T^2}{B M} \sum_{m,i} w_{mi} \, \mathrm{KL}(p^t_{mi} \,\|\, p^s_i)

    Args:
        student: logits [B, K].
        teachers: M tensors of logits [B, K].
        labels: [B], int64.
        temperature: T of the soft targets.

    Raises:
        UsageError: fewer than two teachers.

    Example:
        >>> student, same, other = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[4.0, 0.0]])
        >>> # cross-entropies ln 2 and 0.0181: weights 0.3374, 0.6626; divergences 0 and 4 * 0.3278
        >>> camkd_logit_loss(student, [same, other], torch.tensor([0]), temperature=2.0)  # 0.6626 * 1.3113 / 2
        tensor(0.4344)
    """
    teachers = [at_least_float32(one.detach()) for one in teachers]
    divergences = torch.stack([softened_kl(student, one, temperature) for one in teachers])
    return temperature**2 * (camkd_weights(teachers, labels) * divergences).mean()


def camkd_feature_loss(
    projected: Sequence[Tensor], teachers: Sequence[Tensor], head_logits: Sequence[Tensor], labels: Tensor
) -> Tensor:
    r"""Weighted mean squared difference from each teacher's map, divided by the number of images and of teachers.

    .. math:: \frac{1}{B M} \sum_{m,i} w_{mi} \, \mathrm{mean}\big( (g_m(F^s_i) - F^t_{mi})^2 \big)

    Args:
        projected: M maps [B, C, H, W] of the student, each carried to one teacher's shape.
        teachers: M maps of the same shapes.
        head_logits: M tensors [B, K], each teacher's head on the projected map: they set the weights, with
            gradient.
        labels: [B], int64.

    Raises:
        UsageError: fewer than two teachers, or unequal shapes.

    Example:
        >>> ones, logits = torch.ones(1, 1, 1, 1), torch.zeros(1, 2)  # equal weights 1/2
        >>> camkd_feature_loss([ones, ones], [0 * ones, 3 * ones], [logits, logits], torch.tensor([0]))
        tensor(1.2500)
    """
    for ours, theirs in zip(projected, teachers, strict=True):
        if ours.shape != theirs.shape:
            raise UsageError(f"camkd: a projected map is {list(ours.shape)}, its teacher's {list(theirs.shape)}")
    differences = [
        F.mse_loss(at_least_float32(ours), at_least_float32(theirs.detach()), reduction="none").flatten(1).mean(dim=1)
        for ours, theirs in zip(projected, teachers, strict=True)
    ]
    return (camkd_weights(head_logits, labels) * torch.stack(differences)).mean()


class CAMKD(Method):
    """Labels plus soft targets and maps of several teachers, weighted image by image:
    ``CE + kd_weight * KD + feature_weight * MSE``.
    """

    name = "camkd"
    needs = Requirements(members=True, maps="last", teacher_head=True, pooled=True, epoch=True, labels=True)
    LOGITS = Requirements(members=True, labels=True)  # of the first term alone

    kd_weight: NonNegative = option(default=1.0, doc="weight of the soft targets")
    feature_weight: NonNegative = option(
        default=50.0,
        doc="weight of the last maps; at 0 teachers of any family will do, as neither maps nor heads are read",
    )
    temperature: Positive = option(default=4.0, doc="T of the soft targets")
    features_from: Epochs = option(default=1, doc="first epoch, from 0, with the feature term")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        if self.feature_weight == 0:
            self.needs = self.LOGITS

    def warmup_length(self, epochs: int) -> float:
        start = self.in_epochs("features_from", epochs)
        return start and start + 1

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        if len(teacher.members) < 2:
            raise UsageError(
                f"camkd weighs teachers against each other: it needs 2 or more, got {len(teacher.members)}; "
                "with one teacher use srrl, which also uses the teacher's head"
            )
        if self.needs.maps == "none":  # made for logits alone
            return
        self.projectors = nn.ModuleList(
            Projection(ours.outputs.maps[-1].shape, theirs.outputs.maps[-1].shape, norm=True, activation=True)
            for ours, theirs in zip(student.members, teacher.members, strict=True)
        )

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        logits = [member.logits for member in teacher.members]
        soft = camkd_logit_loss(student.logits, logits, batch.labels, temperature=self.temperature)
        terms = {"kd": self.kd_weight * soft}
        if self.feature_weight and self.needs.maps == "none":
            raise UsageError(
                "camkd was made with feature_weight: 0, so no schedule can raise it: give it a value above 0"
            )
        if self.feature_weight:
            weight = self.feature_weight if self.progress >= self.in_epochs("features_from") else 0
            terms["feature"] = weight * self._features(student, teacher, batch)
        return terms

    def _features(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        theirs = [member.maps[-1] for member in teacher.members]
        projected = [
            projector(resize_map(member.maps[-1], (target.shape[2], target.shape[3])))
            for projector, member, target in zip(self.projectors, student.members, theirs, strict=True)
        ]
        heads = [member.head for member in teacher.members]
        logits = [head(one.mean(dim=(2, 3))) for head, one in zip(heads, projected, strict=True) if head is not None]
        return camkd_feature_loss(projected, theirs, logits, batch.labels)
