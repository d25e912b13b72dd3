"""VID: predict the teacher's maps from the student's, with a learned variance for each channel.

Ahn, Hu, Damianou, Lawrence and Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019.
https://arxiv.org/abs/1904.05835
Default is RepDistiller's form, whose variances are trained like every other parameter.  mdistiller keeps them out of
its optimizer, so that they stay at 5 and its numbers are those of another loss.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.features import pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32

LEAST_VARIANCE = 1e-5


def vid_loss(predicted_mean: Tensor, variance: Tensor, teacher_map: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's map under a Gaussian, less its constant: mean over every element.

    .. math:: \frac{1}{B C H W} \sum \frac{1}{2} \Big( \frac{(\mu - t)^2}{\sigma_c^2} + \ln \sigma_c^2 \Big)

    Args:
        predicted_mean: [B, C, H, W].
        variance: shape [C], above 0.
        teacher_map: [B, C, H, W].

    Returns:
        A scalar; below 0 where the variances are small and the predictions good.

    Example:
        >>> vid_loss(torch.zeros(1, 1, 1, 1), torch.tensor([2.0]), torch.full((1, 1, 1, 1), 2.0))  # (4 / 2 + ln 2) / 2
        tensor(1.3466)
    """
    mean, variance = at_least_float32(predicted_mean), at_least_float32(variance).view(1, -1, 1, 1)
    distance = (mean - at_least_float32(teacher_map.detach())).square()
    return 0.5 * (distance / variance + variance.log()).mean()


class Prediction(nn.Module):
    """Three 1 x 1 convolutions for the mean and one number a channel for the variance."""

    def __init__(self, inputs: int, outputs: int, *, variance: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=1, bias=False)
        self.conv3 = nn.Conv2d(outputs, outputs, kernel_size=1, bias=False)
        self.scale = nn.Parameter(torch.full((outputs,), math.log(math.expm1(variance - LEAST_VARIANCE))))

    def forward(self, features: Tensor) -> Tensor:
        mean: Tensor = self.conv3(F.relu(self.conv2(F.relu(self.conv1(features)))))
        return mean

    @property
    def variance(self) -> Tensor:
        """Shape [C]; by softplus always above ``LEAST_VARIANCE``."""
        return F.softplus(self.scale) + LEAST_VARIANCE


class VID(Method):
    """Labels and predicted maps of paired stages: ``CE + weight * sum of VID``."""

    name = "vid"
    needs = Requirements(maps="pairs")

    weight: NonNegative = option(default=1.0, doc="weight of the predictions")
    variance: Positive = option(default=5.0, doc="variance of every channel at the start", fixed=True)
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        pairs = zip(student.outputs.maps, teacher.outputs.maps, strict=True)
        self.predictions = nn.ModuleList(
            Prediction(ours.shape[1], theirs.shape[1], variance=self.variance) for ours, theirs in pairs
        )

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        losses = []
        for prediction, ours, theirs in zip(self.predictions, student.maps, teacher.maps, strict=True):
            assert isinstance(prediction, Prediction)
            features, target = pool_to_common_size(ours, theirs)
            losses.append(vid_loss(prediction(features), prediction.variance, target))
        return {"vid": self.weight * torch.stack(losses).sum()}
