"""VkD: an orthogonal projection of the student's features, and normalised features of the teacher.

Miles, Elezi and Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024.
https://arxiv.org/abs/2403.06213
The published DeiT students learn the soft targets with a distillation token of their own; here the terms read the
logits that the student puts out, and the mean of its last map (of its patch tokens, in a transformer).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.kd import kd_loss
from potstill.methods.numerics import require_equal_shapes
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32


def vkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    r"""Smooth L1 distance of the projected features to the teacher's, which are brought to mean 0 and variance 1.

    .. math:: \frac{1}{B D} \sum_{b,d} \ell_1\big(h_{bd}, \mathrm{LayerNorm}(f^t_b)_d\big)

    Args:
        projected: [B, D], the student's pooled features behind the projection.
        teacher: [B, D], pooled.

    Example:
        >>> # the teacher's row becomes (-1, 1): differences 1 and 1
        >>> vkd_loss(torch.zeros(1, 2), torch.tensor([[10.0, 30.0]]))
        tensor(0.5000)
    """
    require_equal_shapes(projected, teacher, "vkd: the features")
    theirs = at_least_float32(teacher.detach())
    return F.smooth_l1_loss(at_least_float32(projected), F.layer_norm(theirs, theirs.shape[1:]))


class VkD(Method):
    """Labels, soft targets and orthogonally projected features: ``CE + weight * VkD + kd_weight * KD``."""

    name = "vkd"
    weight: NonNegative = option(default=1.0, doc="weight of the features")
    kd_weight: NonNegative = option(default=1.0, doc="weight of the soft targets")
    temperature: Positive = option(default=1.0, doc="T of the soft targets")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        self.needs = Requirements(maps="last", soft_targets=self.kd_weight > 0)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        inputs, outputs = student.outputs.maps[-1].shape[1], teacher.outputs.maps[-1].shape[1]
        self.project = nn.utils.parametrizations.orthogonal(nn.Linear(inputs, outputs, bias=False))

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ours, theirs = (at_least_float32(side.maps[-1]).mean(dim=(2, 3)) for side in (student, teacher))
        with torch.autocast(ours.device.type, enabled=False):  # orthogonal to 3 digits would not be orthogonal
            projected = self.project(ours)
        terms = {"feature": self.weight * vkd_loss(projected, theirs)}
        if self.kd_weight:
            terms["kd"] = self.kd_weight * kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        return terms
