"""WKD-F: match mean and deviation of each channel, by the Wasserstein distance of two Gaussians.

Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024.
https://arxiv.org/abs/2412.08139
Defaults are those of the released CIFAR-100 settings; presets give the ImageNet ones.  Means and spreads are taken over
cells of a grid that divides each map, so maps of different sizes need no resizing.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def wkd_f_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    mean_weight: NonNegative = 4.0,
    grid: Count = 1,
    eps: Positive = 1e-5,
) -> Tensor:
    r"""Squared distance of means and of standard deviations: summed over channels, averaged over cells and batch.

    .. math:: \frac{1}{B g^2} \sum \gamma (\mu_s - \mu_t)^2 + (\sigma_s - \sigma_t)^2, \qquad
        \sigma = \sqrt{\mathrm{var} + \epsilon}

    Variances are unbiased; a cell of one place has none.

    Args:
        student_map: [B, C, H, W], after its projection.
        teacher_map: [B, C, H', W'].
        mean_weight: :math:`\gamma`, how much means count.
        grid: g cells in each direction.
        eps: added to variances.

    Example:
        >>> student, teacher = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[3.0, 3.0]]]])
        >>> wkd_f_loss(student, teacher)  # 4 (1 - 3)^2 + (sqrt(2) - 0)^2, but for eps
        tensor(17.9911)
    """
    (our_mean, our_spread), (their_mean, their_spread) = (
        _moments(at_least_float32(features), grid, eps) for features in (student_map, teacher_map.detach())
    )
    distance = mean_weight * (our_mean - their_mean).square() + (our_spread - their_spread).square()
    return distance.sum() / (len(distance) * grid**2)


def _moments(features: Tensor, grid: int, eps: float) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, each [B, C, grid * grid]; cells overlap where the grid does not divide the map."""
    height, width = features.shape[2:]
    cells = [
        features[:, :, rows, columns].flatten(2)
        for rows in _spans(height, grid)
        for columns in _spans(width, grid)
    ]  # fmt: skip
    means = torch.stack([cell.mean(dim=2) for cell in cells], dim=2)
    variances = torch.stack([cell.var(dim=2, correction=min(1, cell.shape[2] - 1)) for cell in cells], dim=2)
    return means, (variances + eps).sqrt()


def _spans(size: int, parts: int) -> list[slice]:
    return [slice(part * size // parts, -(-(part + 1) * size // parts)) for part in range(parts)]


class WKDF(Method):
    """Labels and the Gaussians of the last stage's channels: ``CE + weight * WKD-F``."""

    name = "wkd_f"
    needs = Requirements(maps="last")

    weight: NonNegative = option(default=0.08, doc="weight of the distance")
    mean_weight: NonNegative = option(default=4.0, doc="how much means count beside spreads")
    grid: Count = option(default=1, doc="cells of a map in each direction")
    projection: Literal["conv", "bottleneck"] = option(
        default="conv",
        doc='projection of the student to the teacher\'s channels: "conv" is one 1 x 1 convolution with BatchNorm and '
        'ReLU, "bottleneck" goes through 256 channels and a 3 x 3 convolution',
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet32x4-resnet8x4": {"weight": 0.08, "mean_weight": 4.0, "grid": 1, "projection": "conv"},
        "imagenet/resnet34-resnet18": {"weight": 0.02, "mean_weight": 2.0, "grid": 4, "projection": "bottleneck"},
        "imagenet/resnet50-mobilenetv1": {"weight": 0.02, "mean_weight": 2.0, "grid": 4, "projection": "bottleneck"},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = (side.outputs.maps[-1].shape[1] for side in (student, teacher))
        if self.projection == "conv":
            self.project = _layer(ours, theirs, 1)
        else:
            self.project = nn.Sequential(_layer(ours, 256, 1), _layer(256, 256, 3), _layer(256, theirs, 1))

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        projected = self.project(student.maps[-1])
        loss = wkd_f_loss(projected, teacher.maps[-1], mean_weight=self.mean_weight, grid=self.grid)
        return {"wkd_f": self.weight * loss}


def _layer(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size=size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
