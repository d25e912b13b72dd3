"""SimKD: use the teacher's classifier, and regress the features that enter it.

Chen, Mei, Zhang, Wang, Feng and Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022.
https://arxiv.org/abs/2203.14001
The deployed network is the student up to its last map, a projector of three convolutions, and the teacher's pooling
and head: it has more parameters than the student, and the student's own classifier is never trained.  There is no
label term and no KD.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features import pool_to_common_size
from potstill.features.student_surgery import ModifiedStudent, ProjectedHead, require_module_output
from potstill.methods.base import Method, NetworkInfo
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def simkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of the projected map and the teacher's, the larger averaged down to the smaller.

    .. math:: \frac{1}{B C H W} \lVert g(F_s) - F_t \rVert^2

    Args:
        projected: [B, C, H, W], the student's map behind the projector.
        teacher: [B, C, H', W'].

    Example:
        >>> simkd_loss(torch.zeros(1, 1, 1, 1), torch.tensor([[[[1.0, 3.0]]]]))  # the teacher's mean is 2
        tensor(4.)
    """
    if projected.shape[:2] != teacher.shape[:2]:
        shapes = f"{list(projected.shape)} and {list(teacher.shape)}"
        raise UsageError(f"simkd compares maps of as many images and channels, got {shapes}; project the student's")
    ours, theirs = pool_to_common_size(at_least_float32(projected), at_least_float32(teacher.detach()))
    return F.mse_loss(ours, theirs)


class SimKD(Method):
    """The teacher's last map through a projector, under the teacher's head: ``weight * MSE``, no labels."""

    name = "simkd"
    needs = Requirements(maps="last", teacher_head=True, pooled=True)

    weight: NonNegative = option(default=1.0, doc="weight of the maps' difference")
    reduction: Count = option(
        default=2, doc="the projector's hidden layers have 1 / reduction of the teacher's channels"
    )
    ce_weight: NonNegative = option(
        default=0.0, doc="weight of the label term, through the teacher's head; 0 in the paper"
    )

    def for_teachers(self, shares: Sequence[float]) -> Method:
        if len(shares) > 1:
            got = f"got {len(shares)} teachers; camkd takes several"
            raise UsageError(f"simkd gives the student one teacher's head, {got}")
        self.student_taps = ()  # of a student that was remodelled before
        return self

    @torch.no_grad()
    def modify_student(self, student: nn.Module, student_side: NetworkInfo, teacher_side: NetworkInfo) -> nn.Module:
        head, target = teacher_side.outputs.head, teacher_side.outputs.maps[-1]
        assert head is not None
        stage = student_side.stages[-1]
        require_module_output(stage, "simkd")
        if isinstance(student, ModifiedStudent):
            raise UsageError(
                f"simkd cannot change a network that was changed already ({student.name}); use one such method"
            )
        size = min(stage.height, target.shape[2]), min(stage.width, target.shape[3])
        pooled = size != (stage.height, stage.width)
        joined = ProjectedHead(
            student,
            stage=stage.module,
            channels=stage.channels,
            outputs=target.shape[1],
            classes=len(head.weight),
            factor=self.reduction,
            pool_height=size[0] if pooled else 0,
            pool_width=size[1] if pooled else 0,
            layout=stage.layout,
            height=stage.height if stage.layout == "tokens" else 0,
            width=stage.width if stage.layout == "tokens" else 0,
            prefix=stage.prefix,
            copied=stage.copied,
            bias=head.bias is not None,
        )
        joined.head.weight.copy_(head.weight)
        if head.bias is not None:
            joined.head.bias.copy_(head.bias)
        self.student_taps = ("projector",)
        return joined

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"feature": self.weight * simkd_loss(student.features["projector"], teacher.maps[-1])}
