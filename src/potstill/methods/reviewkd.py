"""ReviewKD: match the teacher's stages with student stages that are fused from deep to shallow.

Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021.  https://arxiv.org/abs/2104.09044
The teacher's maps are taken before their last activation.  The student's are taken after it for CIFAR and before it
(``student_before_activation``) for ImageNet, as in the released settings.  mdistiller ships one weight for CIFAR, 5,
which is the default; the authors' README tunes it per pair (presets).  mdistiller's class ignores its own setting of
``max_mid`` for MobileNetV1 and uses 512, and so do the presets.  The authors' CIFAR script leaves the teacher in train
mode; here it is in eval mode, as in mdistiller.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import Count, Epochs, NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def hcl_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Hierarchical context loss: mean squared error of the maps and of coarser and coarser averages of them.

    .. math:: \sum_\text{pairs} \frac{\sum_j 2^{-j} \, \mathrm{MSE}\big(P_j(F_s), P_j(F_t)\big)}{\sum_j 2^{-j}}

    :math:`P_0` leaves the map as it is; the next ones average it to 4 x 4, 2 x 2 and 1 x 1.  Sizes that are not smaller
    than the map are left out, and then do not count among the :math:`j`.

    Args:
        student_maps: each of [B, C, H, W].
        teacher_maps: of the same shapes.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])
        >>> hcl_loss([student], [teacher])  # (4 / 4 + 0.5 * 0.5^2) / 1.5: only 1 x 1 is smaller than the map
        tensor(0.7500)
    """
    losses = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
        for size in (4, 2, 1):
            if size < student.shape[2]:
                weight /= 2
                coarse = F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
                loss, total = loss + weight * coarse, total + weight
        losses.append(loss / total)
    return torch.stack(losses).sum()


class Fusion(nn.Module):
    """Attention-based fusion of one student stage with what came from the deeper ones, if any."""

    def __init__(self, inputs: int, middle: int, outputs: int, *, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, middle, kernel_size=1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(middle)
        self.expand = nn.Conv2d(middle, outputs, kernel_size=3, padding=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(outputs)
        self.attention = None if deepest else nn.Conv2d(2 * middle, 2, kernel_size=1)
        for conv in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, features: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns what is compared with the teacher's map of ``size``, and what the next shallower stage receives."""
        fused = self.reduce_norm(self.reduce(features))
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, size=fused.shape[2:], mode="nearest")
            shares = torch.sigmoid(self.attention(torch.cat([fused, deeper], dim=1)))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != torch.Size(size):
            fused = F.interpolate(fused, size=tuple(size), mode="nearest")
        return self.expand_norm(self.expand(fused)), fused


class Review(nn.Module):
    """The chain of fusions, from the deepest stage up; the last of ``student_channels`` is that of the embedding."""

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, max_mid: int) -> None:
        super().__init__()
        middle = min(max_mid, student_channels[-1])
        deep_first = list(zip(student_channels, teacher_channels, strict=True))[::-1]
        self.fusions = nn.ModuleList(
            Fusion(inputs, middle, outputs, deepest=position == 0)
            for position, (inputs, outputs) in enumerate(deep_first)
        )

    def forward(self, student_maps: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Maps of the teacher's channels and ``sizes``, shallow to deep."""
        outputs: list[Tensor] = []
        carried: Tensor | None = None
        for fusion, features, size in zip(self.fusions, student_maps[::-1], sizes[::-1], strict=True):
            output, carried = fusion(features, carried, size)
            outputs.insert(0, output)
        return outputs


class ReviewKD(Method):
    """Labels and reviewed stages: ``CE + weight * min((epoch + 1) / warmup_epochs, 1) * HCL``."""

    name = "reviewkd"

    weight: NonNegative = option(default=5.0, doc="weight of the review")
    warmup_epochs: Epochs = option(default=20.0, of_epochs=240, doc="epochs over which the weight rises; 0 for none")
    max_mid: Count = option(default=512, doc="most channels in which stages are fused")
    student_before_activation: bool = option(
        default=False, doc="read the student's maps before their last activation too (ImageNet)"
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet56-resnet20": {"weight": 0.6},
        "cifar100/resnet110-resnet32": {"weight": 1.0},
        "cifar100/resnet32x4-resnet8x4": {"weight": 5.0},
        "cifar100/wrn_40_2-wrn_16_2": {"weight": 5.0},
        "cifar100/wrn_40_2-wrn_40_1": {"weight": 5.0},
        "cifar100/resnet32x4-shufflenetv1": {"weight": 5.0},
        "cifar100/wrn_40_2-shufflenetv1": {"weight": 5.0},
        "cifar100/resnet32x4-shufflenetv2": {"weight": 8.0},
        "imagenet/resnet34-resnet18": {"weight": 1.0, "warmup_epochs": 1, "student_before_activation": True},
        "imagenet/resnet50-mobilenetv1": {"weight": 8.0, "warmup_epochs": 1, "student_before_activation": True},
    }

    def __post_init__(self) -> None:
        self.needs = Requirements(
            maps="pairs",
            before_activation="both" if self.student_before_activation else "teacher",
            embedding=True,
            epoch=self.warmup_epochs != 0,
            several=True,  # BatchNorm of pooled features
        )

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = ([level.shape[1] for level in _levels(side.outputs)] for side in (student, teacher))
        self.review = Review(ours, theirs, max_mid=self.max_mid)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        targets = _levels(teacher)
        reviewed = self.review(_levels(student), [target.shape[2:] for target in targets])
        return {"review": self.weight * self.warmup(self.in_epochs("warmup_epochs")) * hcl_loss(reviewed, targets)}


def _levels(outputs: Outputs) -> list[Tensor]:
    assert outputs.embedding is not None  # needs.embedding
    return [*outputs.maps, outputs.embedding[:, :, None, None]]
