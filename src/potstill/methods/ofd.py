"""OFD: match maps before the teacher's last activation, with a margin for values that the activation cuts off.

Heo, Kim, Yun, Park, Kwak and Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.
https://arxiv.org/abs/1904.01866
The released CIFAR code leaves the teacher in train mode, and mdistiller keeps the margins out of the state dict; here
the teacher is in eval mode and the margins are buffers.  Where stages differ in size, the larger map is averaged down
to the smaller (the authors join stages of one size).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features import pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def ofd_margin(norm: nn.BatchNorm2d) -> Tensor:
    r"""Mean of a channel's negative values, from the BatchNorm that made them; shape [1, C, 1, 1], float32.

    .. math:: m = \mu - \sigma \frac{\phi(\mu / \sigma)}{\Phi(-\mu / \sigma)}, \qquad \mu = \text{bias}, \;
        \sigma = |\text{weight}|

    Where almost no value is negative (:math:`\Phi(-\mu / \sigma) \le 0.001`) it is :math:`-3 \sigma`.

    Example:
        >>> ofd_margin(nn.BatchNorm2d(1)).item()  # a standard normal: -sqrt(2 / pi)
        -0.797884...
    """
    # On the CPU, since MPS has no float64.
    mean, spread = norm.bias.detach().cpu().double(), norm.weight.detach().cpu().double().abs()
    ratio = mean / spread  # infinite for a channel without spread, whose margin is its mean or 0 if that is positive
    share = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(share > 0.001, mean - spread * density / share.clamp(min=0.001), -3 * spread)
    return margin.float().view(1, -1, 1, 1).to(norm.weight.device)


def ofd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    r"""Partial squared distance before the activation: summed over a map, averaged over the batch.

    .. math:: \sum_{i=1}^n \frac{1}{2^{n-i}} \frac{1}{B} \sum
        \begin{cases} 0 & s \le t \le 0 \\ (s - \max(t, m))^2 & \text{else} \end{cases}

    A value below the margin counts as the margin, and one that the activation would cut off in both networks alike is
    left alone.

    Args:
        student_maps: each of [B, C, H, W], after its connector.
        teacher_maps: of the same shapes.
        margins: for each pair, shape [1, C, 1, 1]; see ``ofd_margin``.

    Returns:
        A scalar, at least 0; large, as it is a sum over the map.

    Example:
        >>> student, teacher = torch.tensor([1.0, -2.0]).view(1, 1, 1, 2), torch.tensor([3.0, -1.0]).view(1, 1, 1, 2)
        >>> ofd_loss([student], [teacher], [torch.full((1, 1, 1, 1), -0.5)])  # (1 - 3)^2; -2 is below -0.5: left alone
        tensor(4.)
    """
    terms = []
    for student, teacher, margin in zip(student_maps, teacher_maps, margins, strict=True):
        student = at_least_float32(student)
        target = torch.maximum(at_least_float32(teacher.detach()), margin)
        distance = (student - target).square() * ((student > target) | (target > 0))
        terms.append(distance.sum() / len(student))
    return torch.stack([term / 2 ** (len(terms) - 1 - position) for position, term in enumerate(terms)]).sum()


class OFD(Method):
    """Labels and partial distances of paired stages: ``CE + weight * OFD``."""

    name = "ofd"
    needs = Requirements(maps="pairs", before_activation="both", norms=True)

    weight: NonNegative = option(default=1e-3, doc="weight of the distance; 1e-3 for CIFAR, 1e-4 for ImageNet")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet/resnet34-resnet18": {"weight": 1e-4},
        "imagenet/resnet50-mobilenetv1": {"weight": 1e-4},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        pairs = list(zip(student.outputs.maps, teacher.outputs.maps, strict=True))
        for position, norm in enumerate(teacher.norms):
            if norm is None or not norm.affine:
                raise UsageError(
                    f"ofd takes its margins from the BatchNorm in front of the teacher's maps; stage {position + 1} of "
                    f"{len(pairs)} has none. Use reviewkd, which also compares maps before their activation"
                )
            self.register_buffer(f"margin{position}", ofd_margin(norm))
        self.connectors = nn.ModuleList(connector(ours.shape[1], theirs.shape[1]) for ours, theirs in pairs)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        connected = [join(features) for join, features in zip(self.connectors, student.maps, strict=True)]
        pairs = [pool_to_common_size(ours, theirs) for ours, theirs in zip(connected, teacher.maps, strict=True)]
        margins = [self.get_buffer(f"margin{position}") for position in range(len(pairs))]
        loss = ofd_loss([ours for ours, _ in pairs], [theirs for _, theirs in pairs], margins)
        return {"ofd": self.weight * loss}


def connector(inputs: int, outputs: int) -> nn.Sequential:
    """1 x 1 convolution and BatchNorm, initialised as the authors' networks are."""
    conv = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / outputs))
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
