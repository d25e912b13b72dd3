"""MGD: mask channels of the student's last map at random, and generate the teacher's whole map from the rest.

Yang, Li, Shao, Shi, Yuan and Yuan, "Masked Generative Distillation", ECCV 2022.  https://arxiv.org/abs/2205.01529
The form for classification, which masks channels (the one for detection masks places).  Where stages differ in size,
the larger map is averaged down to the smaller (the paper joins stages of one size).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from potstill.features import pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Share, option
from potstill.types import Batch, Outputs, at_least_float32


def mgd_loss(generated: Tensor, teacher_map: Tensor) -> Tensor:
    r"""Squared error, summed over a map and averaged over the batch.

    .. math:: \frac{1}{B} \sum_{b,c,h,w} (G - F_t)^2

    Args:
        generated: [B, C, H, W], see ``Generator``.
        teacher_map: of the same shape.

    Returns:
        A scalar, at least 0; large, as it is a sum over the map.

    Example:
        >>> mgd_loss(torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]], [[[0.0, 3.0]]]]))  # (5 + 9) / 2
        tensor(7.)
    """
    return (at_least_float32(generated) - at_least_float32(teacher_map.detach())).square().sum() / len(generated)


class Generator(nn.Module):
    """The teacher's map from a student's map with channels missing; equal numbers of channels need no layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.align = nn.Conv2d(inputs, outputs, kernel_size=1) if inputs != outputs else None
        self.conv1 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1)

    def forward(self, features: Tensor, kept: Tensor) -> Tensor:
        """``kept``: shape [B, C, 1, 1] in the teacher's channels, 1 where a channel stays and 0 where it is masked."""
        if self.align is not None:
            features = self.align(features)
        generated: Tensor = self.conv2(torch.relu(self.conv1(features * kept)))
        return generated


class MGD(Method):
    """Labels and the generated last map: ``CE + weight * MGD``."""

    name = "mgd"
    needs = Requirements(maps="last")

    weight: NonNegative = option(default=7e-5, doc="weight of the map; 7e-5 for ImageNet, 1.2e-3 for CIFAR-100")
    mask_share: Share = option(default=0.15, doc="how many channels are masked, on average")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet32x4-resnet8x4": {"weight": 1.2e-3},
        "imagenet/resnet34-resnet18": {"weight": 7e-5},
    }

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        self.generator = Generator(student.outputs.maps[-1].shape[1], teacher.outputs.maps[-1].shape[1])

    def draw(self, features: Tensor) -> Tensor:
        """Uniform numbers [B, C, 1, 1] for a map [B, C, H, W]; a channel below ``mask_share`` is masked."""
        return torch.rand(*features.shape[:2], 1, 1, device=features.device)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ours, theirs = pool_to_common_size(student.maps[-1], teacher.maps[-1])
        kept = (self.draw(theirs) >= self.mask_share).to(ours.dtype)
        return {"mgd": self.weight * mgd_loss(self.generator(ours, kept), theirs)}
