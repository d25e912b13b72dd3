"""Inter-channel correlation: match the correlations between channels.

Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation", ICCV 2021.
https://arxiv.org/abs/2202.03680
Weight and form are those of the authors' CIFAR code; torchdistill divides by the batch size once more, so its weights
do not carry over.
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.features import Projection
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of the channels' correlations, summed, per channel and image.

    .. math:: \frac{1}{B C} \sum_b \lVert \hat E^s_b - \hat E^t_b \rVert_F^2, \quad E_b = F_b F_b^\top

    with :math:`F_b` of shape [C, H W]; the rows of :math:`\hat E` have length 1.

    Args:
        student: maps [B, C, H, W], already with the teacher's channels.
        teacher: maps [B, C, H', W']; the sizes may differ.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # channels apart: rows (1, 0) and (0, 1)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)  # together: rows (0.7071, 0.7071)
        >>> ickd_loss(student, teacher)  # by hand: 2 ((1 - 0.7071)^2 + 0.7071^2) / 2
        tensor(0.5858)
    """
    if student.shape[:2] != teacher.shape[:2]:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise UsageError(f"ickd compares maps of as many images and channels, got {shapes}; carry the student's over")
    difference = _correlations(student) - _correlations(teacher.detach())
    return difference.square().sum() / (student.shape[0] * student.shape[1])


def _correlations(features: Tensor) -> Tensor:
    channels = at_least_float32(features).flatten(2)
    return F.normalize(inner_products(channels, channels), dim=2)


class ICKD(Method):
    """Labels plus correlations between the channels of the last map: ``CE + weight * ICKD``.

    The student's map passes a trained 1x1 convolution and BatchNorm to the teacher's channels.
    """

    name = "ickd"
    needs = Requirements(maps="last")

    weight: NonNegative = option(default=2.5, doc="weight of the correlations")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        self.adapter = Projection(student.outputs.maps[-1].shape, teacher.outputs.maps[-1].shape, norm=True)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"correlation": self.weight * ickd_loss(self.adapter(student.maps[-1]), teacher.maps[-1])}
