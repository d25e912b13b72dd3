"""CAT-KD: match class activation maps.

Guo, Yan, Li and Lin, "Class Attention Transfer Based Knowledge Distillation", CVPR 2023.
https://arxiv.org/abs/2304.12777
The released networks put the classifier, as a 1x1 convolution without bias, in front of the pooling; here the maps
are computed from the network's own linear head and last feature map, which is the same where the head reads the mean
of that map.  Others are refused.  The weight is tuned per pair: take a preset.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.numerics import require_equal_shapes
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, checked, option
from potstill.types import Batch, Head, Outputs, at_least_float32


@checked
def cat_kd_loss(student_maps: Tensor, teacher_maps: Tensor, *, resolution: Count = 2, normalize: bool = True) -> Tensor:
    r"""Mean squared difference of class activation maps, pooled and brought to length 1.

    .. math:: \frac{1}{B K R^2} \sum_{b,k} \Big\lVert \frac{a^s_{bk}}{\lVert a^s_{bk} \rVert_2} -
        \frac{a^t_{bk}}{\lVert a^t_{bk} \rVert_2} \Big\rVert_2^2, \quad a = \mathrm{pool}_{R \times R}(\mathrm{CAM})

    Args:
        student_maps: [B, K, H, W], one map for each class.
        teacher_maps: [B, K, H', W'].
        resolution: R, to which the maps are averaged.
        normalize: bring each class's map to length 1.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])  # all of it in one corner
        >>> teacher = torch.tensor([[[[0.0, 3.0], [0.0, 0.0]]]])  # in another: (1, 0, 0, 0) against (0, 1, 0, 0)
        >>> cat_kd_loss(student, teacher)  # 2 / 4
        tensor(0.5000)
    """
    ours, theirs = (
        F.adaptive_avg_pool2d(at_least_float32(maps), resolution) for maps in (student_maps, teacher_maps.detach())
    )
    require_equal_shapes(ours, theirs, "cat_kd: the pooled class activation maps")
    if normalize:
        ours, theirs = (F.normalize(maps.flatten(2), dim=2) for maps in (ours, theirs))
    return F.mse_loss(ours, theirs)


def class_activation_maps(maps: Tensor, head: Head) -> Tensor:
    """Return the classifier's logits at each position, without its bias: [B, D, H, W] -> [B, K, H, W].

    Example:
        >>> import torch
        >>> class_activation_maps(torch.ones(1, 2, 1, 1), Head(torch.tensor([[1.0, 2.0]]), None)).flatten()
        tensor([3.])
    """
    return F.conv2d(maps, head.weight.to(maps.dtype)[:, :, None, None])


class CATKD(Method):
    """Labels plus class activation maps: ``CE + weight * CAT``."""

    name = "cat_kd"
    needs = Requirements(maps="last", student_head=True, teacher_head=True, pooled=True)

    weight: NonNegative = option(default=400.0, doc="weight of the maps; from 0.7 to 600 in the authors' pairs")
    resolution: Count = option(default=2, doc="R x R places to which the maps are averaged")
    normalize: bool = option(default=True, doc="bring each class's map to length 1")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet56-resnet20": {"weight": 0.7},
        "cifar100/resnet110-resnet32": {"weight": 1.8},
        "cifar100/resnet32x4-resnet8x4": {"weight": 15.0},
        "cifar100/wrn_40_2-wrn_16_2": {"weight": 12.0},
        "cifar100/wrn_40_2-wrn_40_1": {"weight": 1.5},
        "cifar100/vgg13-vgg8": {"weight": 4.5},
        "cifar100/resnet32x4-shufflenetv1": {"weight": 600.0, "resolution": 4},
        "cifar100/resnet32x4-shufflenetv2": {"weight": 600.0, "resolution": 4},
        "cifar100/wrn_40_2-shufflenetv1": {"weight": 80.0, "resolution": 4},
        "cifar100/resnet50-mobilenetv2": {"weight": 40.0},
        "cifar100/vgg13-mobilenetv2": {"weight": 15.0},
    }

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.head is not None
        assert teacher.head is not None
        ours = class_activation_maps(student.maps[-1], student.head)
        theirs = class_activation_maps(teacher.maps[-1], teacher.head)
        loss = cat_kd_loss(ours, theirs, resolution=self.resolution, normalize=self.normalize)
        return {"attention": self.weight * loss}
