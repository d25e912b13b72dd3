"""SDD: match logits of image regions at several scales, with more weight where region and image disagree.

Wei, Luo and Luo, "Scale Decoupled Distillation", CVPR 2024.  https://arxiv.org/abs/2403.13512
Paper and release agree for the variants on Hinton's loss and on DKD; the release's third, on NKD, masks nothing and is
left out.  A region's logits come from the network's own head, applied to the mean of the last map over the region, so
both networks must end in average pooling and one linear layer.  The sum is divided by the number of regions, so more
scales do not weigh more; regions with twice the weight do.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import (
    drop_target,
    inner_products,
    require_three_classes,
    softened_kl,
    softened_target_kl,
)
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, checked, option
from potstill.types import Batch, Head, Outputs, at_least_float32


def region_logits(features: Tensor, head: Head, scales: list[int]) -> Tensor:
    """Logits of the cells of grids that divide a feature map.

    Args:
        features: [B, D, H, W].
        head: reads the mean of a region.
        scales: m for a grid of m x m cells.

    Returns:
        Shape [B, K, N] for N cells in all, in at least float32 (also within autocast).

    Example:
        >>> features = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
        >>> region_logits(features, Head(torch.tensor([[1.0], [-1.0]]), None), [1, 2])
        tensor([[[ 4.,  1.,  3.,  5.,  7.],
                 [-4., -1., -3., -5., -7.]]])
    """
    cells = [F.adaptive_avg_pool2d(at_least_float32(features), scale).flatten(2) for scale in scales]
    logits = inner_products(torch.cat(cells, dim=2).transpose(1, 2), head.weight)
    return (logits if head.bias is None else logits + head.bias).transpose(1, 2)


@checked
def sdd_kd_loss(
    student_regions: Tensor, teacher_regions: Tensor, labels: Tensor, *, temperature: Positive = 4.0
) -> Tensor:
    r"""Hinton's loss of every region, twice where the teacher is right about one of region and image only.

    .. math:: \frac{T^2}{B N} \sum_{bn} w_{bn} \, \mathrm{KL}\big(\mathrm{softmax}(z^t_{bn} / T) \,\|\,
        \mathrm{softmax}(z^s_{bn} / T)\big), \quad w_{bn} \in \{1, 2\}

    Args:
        student_regions: [B, K, N]; the first region is the whole image.
        teacher_regions: likewise.
        labels: [B], int64 class ids.

    Example:
        >>> teacher = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]).log()  # right about the image, wrong about the region
        >>> # 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308 of each: (1 + 2) / 2 times that
        >>> sdd_kd_loss(torch.zeros(1, 2, 2), teacher, torch.tensor([0]), temperature=1.0)
        tensor(0.1962)
    """
    student, teacher = (each.transpose(1, 2).flatten(0, 1) for each in (student_regions, teacher_regions))
    divergence = softened_kl(student, teacher, temperature)
    return temperature**2 * (_weights(teacher_regions, labels).flatten() * divergence).mean()


@checked
def sdd_dkd_loss(
    student_regions: Tensor,
    teacher_regions: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 4.0,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 8.0,
) -> Tensor:
    r"""As ``sdd_kd_loss``, with DKD's two parts in place of Hinton's loss.

    .. math:: \frac{T^2}{B N} \sum_{bn} w_{bn} (\alpha \, \mathrm{TCKD}_{bn} + \beta \, \mathrm{NCKD}_{bn})

    Args:
        student_regions: [B, K, N]; the first region is the whole image.
        teacher_regions: likewise.
        labels: [B], int64 class ids.
        alpha: weight of the target class against all others.
        beta: weight of the others among themselves.

    Example:
        >>> teacher = torch.tensor([[[12.0], [3.0], [1.0]]]).log()
        >>> # as in dkd_loss: 0.3630 and twice 0.1308
        >>> sdd_dkd_loss(torch.zeros(1, 3, 1), teacher, torch.tensor([0]), temperature=1.0, beta=2.0)
        tensor(0.6246)
    """
    regions = student_regions.shape[2]
    student, teacher = (
        at_least_float32(each).transpose(1, 2).flatten(0, 1) for each in (student_regions, teacher_regions.detach())
    )
    targets = labels.repeat_interleave(regions)
    target = softened_target_kl(student, teacher, targets, temperature)
    others = softened_kl(drop_target(student, targets), drop_target(teacher, targets), temperature)
    weights = _weights(teacher_regions, labels).flatten()
    return temperature**2 * (weights * (alpha * target + beta * others)).mean()


def _weights(teacher_regions: Tensor, labels: Tensor) -> Tensor:
    """[B, N]: 2 where the teacher is right about the region and wrong about the image, or the other way round."""
    right = teacher_regions.argmax(dim=1) == labels[:, None]
    return 1.0 + (right != right[:, :1]).to(at_least_float32(teacher_regions).dtype)


class SDD(Method):
    """Labels and logits of regions: ``CE + weight * SDD``."""

    name = "sdd"
    needs = Requirements(maps="last", student_head=True, teacher_head=True, pooled=True, labels=True)

    variant: Literal["kd", "dkd"] = option(
        default="kd", doc='"kd" compares regions by Hinton\'s loss, "dkd" by DKD\'s parts'
    )
    weight: NonNegative = option(default=1.0, doc="weight of the regions")
    temperature: Positive = option(default=4.0, doc="T")
    scales: list[Count] = option(default=[1, 2, 4], doc="m of each grid of m x m regions, beginning with 1")
    alpha: NonNegative = option(default=1.0, doc="weight of DKD's target-class part")
    beta: NonNegative = option(default=8.0, doc="weight of DKD's non-target part")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        if self.scales[:1] != [1]:
            raise UsageError(f"scales must begin with 1, the whole image, got {self.scales}")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        if self.variant == "dkd":
            require_three_classes("sdd (dkd)", training.classes)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ours, theirs = self.regions(student), self.regions(teacher)
        if self.variant == "kd":
            loss = sdd_kd_loss(ours, theirs, batch.labels, temperature=self.temperature)
        else:
            loss = sdd_dkd_loss(
                ours, theirs, batch.labels, temperature=self.temperature, alpha=self.alpha, beta=self.beta
            )
        return {"sdd": self.weight * loss}

    def regions(self, outputs: Outputs) -> Tensor:
        """Logits [B, K, N] of a network's regions."""
        assert outputs.head is not None  # declared in `needs`
        return region_logits(outputs.maps[-1], outputs.head, self.scales)
