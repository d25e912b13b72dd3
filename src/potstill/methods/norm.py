"""NORM: match the teacher's last map with many student representations, by a block that merges into the network.

Liu, Li, Li and Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching", ICLR 2023.
https://arxiv.org/abs/2305.13803
Behind its last map the student gets a linear block: 1x1 to N times the teacher's channels, 1x1 back, plus the map.
``merged()`` of the trained student folds it into one 1x1 convolution.  As released, logits of student and teacher are
brought to mean 0 and variance 1 over the classes and multiplied by 2.5, in training and evaluation (``logit_scale=0``
leaves them as they are), and the weight rises and falls with the epochs; the release tunes ``ce_weight`` per pair among
0.0625, 0.125, 0.25 and 0.5.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.student_surgery import ExpandedStage, ModifiedStudent, layer_norm_logits, require_module_output
from potstill.methods.base import Method, NetworkInfo
from potstill.methods.kd import kd_loss
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32

# Shares of the run up to which a weight holds: of 240 epochs for CIFAR, of 100 for ImageNet.
PROFILES: dict[str, list[tuple[float, float]]] = {
    "cifar": [(10 / 240, 0.1), (20 / 240, 0.5), (180 / 240, 1.0), (210 / 240, 0.5), (1.0, 0.1)],
    "imagenet": [(5 / 100, 0.1), (15 / 100, 0.5), (60 / 100, 0.9), (80 / 100, 0.5), (1.0, 0.1)],
    "constant": [(1.0, 1.0)],
}


def norm_loss(expanded: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of N student representations from one teacher map, times N.

    .. math:: \frac{1}{B C H W} \sum_{n=1}^{N} \lVert h_n - F_t \rVert^2

    The larger map is reduced to the smaller by its largest values.

    Args:
        expanded: [B, N C, H, W].
        teacher: [B, C, H', W'].

    Raises:
        UsageError: the channels are no multiple of the teacher's.

    Example:
        >>> import torch
        >>> expanded = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)  # N = 2 representations of one channel
        >>> norm_loss(expanded, torch.zeros(1, 1, 1, 1))  # 1 + 4
        tensor(5.)
    """
    if expanded.shape[1] % teacher.shape[1]:
        raise UsageError(
            f"norm matches several maps to one of {teacher.shape[1]} channels, got {expanded.shape[1]}: no multiple"
        )
    size = (min(expanded.shape[2], teacher.shape[2]), min(expanded.shape[3], teacher.shape[3]))
    ours, theirs = (
        features if features.shape[2:] == size else F.adaptive_max_pool2d(features, size)
        for features in (at_least_float32(expanded), at_least_float32(teacher.detach()))
    )
    differences = ours.reshape(len(ours), -1, *theirs.shape[1:]) - theirs.unsqueeze(1)
    return differences.square().mean() * differences.shape[1]


class NORM(Method):
    """Labels plus N-to-one matching of the last map: ``ce_weight * CE + weight(epoch) * NORM + kd_weight * KD``."""

    name = "norm"
    weight: NonNegative = option(default=1.0, doc="weight of the matching, times the factor of the profile")
    representations: Count = option(default=8, doc="N")
    profile: Literal["cifar", "imagenet", "constant"] = option(
        default="cifar", doc='"cifar" (0.1, 0.5, 1, 0.5, 0.1), "imagenet" (0.1, 0.5, 0.9, 0.5, 0.1) or "constant"'
    )
    kd_weight: NonNegative = option(default=0.0, doc="weight of the soft targets")
    temperature: Positive = option(default=4.0, doc="T of the soft targets")
    logit_scale: NonNegative = option(
        default=2.5,
        doc="scale of logits brought to variance 1; 0: logits are left as they are",
        fixed=True,
    )
    ce_weight: NonNegative = option(default=0.25, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet/resnet34-resnet18": {"ce_weight": 1.0, "profile": "imagenet"},
        "imagenet/resnet50-mobilenetv1": {"ce_weight": 0.125, "profile": "imagenet"},
    }

    def __post_init__(self) -> None:
        self.needs = Requirements(maps="last", epoch=True, soft_targets=self.kd_weight > 0)

    def for_teachers(self, shares: Sequence[float]) -> Method:
        if len(shares) > 1:
            got = f"got {len(shares)} teachers; fitnet takes several"
            raise UsageError(f"norm widens the student for one teacher, {got}")
        self.student_taps = ()  # of a student that was remodelled before
        return self

    def modify_student(self, student: nn.Module, student_side: NetworkInfo, teacher_side: NetworkInfo) -> nn.Module:
        stage = student_side.stages[-1]
        require_module_output(stage, "norm")
        if isinstance(student, ModifiedStudent):
            raise UsageError(
                f"norm cannot change a network that was changed already ({student.name}); use one such method"
            )
        if stage.layout == "tokens":
            raise UsageError(
                f"norm puts convolutions behind the student's last map, and {type(student).__name__} has tokens; "
                "vkd is made for them"
            )
        expanded = ExpandedStage(
            student,
            stage=stage.module,
            channels=stage.channels,
            expanded=self.representations * teacher_side.outputs.maps[-1].shape[1],
            layout=stage.layout,
            logit_scale=self.logit_scale,
        )
        self.student_taps = (expanded.tap,)
        return expanded

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        (tap,) = self.student_taps
        scheduled = self.weight * self.scheduled()
        terms = {"matching": scheduled * norm_loss(student.features[tap], teacher.maps[-1])}
        if self.kd_weight:
            theirs = layer_norm_logits(teacher.logits) * self.logit_scale if self.logit_scale else teacher.logits
            terms["kd"] = self.kd_weight * kd_loss(student.logits, theirs, temperature=self.temperature)
        return terms

    def scheduled(self) -> float:
        """The weight's factor in this epoch."""
        share = self.progress / max(self.epochs or 1, 1)
        steps = PROFILES[self.profile]
        return next((factor for end, factor in steps if share < end), steps[-1][1])
