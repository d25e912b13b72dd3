"""FSP: match the inner products between the maps of two stages, in a phase before the labels.

Yim, Joo, Bae and Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning", CVPR 2017.
https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
The published CIFAR numbers (RepDistiller) train on the flow alone for 30 epochs, then on labels alone for 240:
``init_share`` is the first part's share of a run.  Maps are averaged to a common size there, where the paper takes the
largest value of each cell; the first is done here.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.features import pool_to_common_size
from potstill.methods.ab import active_terms
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, Share, option
from potstill.types import Batch, Outputs, at_least_float32


def fsp_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Mean squared difference of the flow matrices between successive maps, summed over the pairs of successive maps.

    .. math:: G_{cd}(F, F') = \frac{1}{H W} \sum_{h,w} F_{chw} F'_{dhw}, \qquad
        \sum_i \overline{\big(G(F_s^i, F_s^{i+1}) - G(F_t^i, F_t^{i+1})\big)^2}

    Of two successive maps, the larger is averaged down to the smaller.

    Args:
        student_maps: two or more, each of [B, C, H, W].
        teacher_maps: as many, of the same B and C; sizes may differ.

    Example:
        >>> student = [torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]])]
        >>> teacher = [torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[4.0, 2.0]]]])]
        >>> fsp_loss(student, teacher)  # flows (2 + 0) / 2 and (4 + 2) / 2
        tensor(4.)
    """
    ours = _flows([at_least_float32(features) for features in student_maps])
    theirs = _flows([at_least_float32(features.detach()) for features in teacher_maps])
    return torch.stack([F.mse_loss(own, wanted) for own, wanted in zip(ours, theirs, strict=True)]).sum()


def _flows(maps: Sequence[Tensor]) -> list[Tensor]:
    flows = []
    for lower, upper in pairwise(maps):
        first, second = (features.flatten(2) for features in pool_to_common_size(lower, upper))
        flows.append(inner_products(first, second) / first.shape[2])
    return flows


class FSP(Method):
    """First flow, then labels: ``weight * FSP`` in the first epochs, ``CE`` in the others."""

    name = "fsp"

    weight: NonNegative = option(default=50.0, doc="weight of the flow; 50 in RepDistiller")
    init_share: Share = option(
        default=0.111,
        doc="share of the epochs that come before labels; 30 of 270 in RepDistiller. 0, or a run of one epoch: labels "
        "and flow together throughout.",
    )
    ce_weight: Positive = option(
        default=1.0, doc="weight of the label term; above 0, as nothing else is left after the first part"
    )

    def __post_init__(self) -> None:
        self.needs = Requirements(maps="pairs", epoch=self.init_share > 0)

    @property
    def staged(self) -> bool:
        return self.init_share > 0

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = ([features.shape[1] for features in side.outputs.maps] for side in (student, teacher))
        if len(ours) < 2:
            raise UsageError(
                "fsp joins successive stages; these networks have one pair. Use nst, which takes any number"
            )
        if ours != theirs:
            raise UsageError(
                f"fsp compares products of channels, which must be as many in both networks; the student's stages have "
                f"{ours}, the teacher's {theirs}. Use ickd, which relates channels through a connector"
            )

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        _, labels = active_terms(self.init_share, self)
        return super().label_terms(student, batch) if labels else {}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        flow, _ = active_terms(self.init_share, self)
        return {"flow": self.weight * fsp_loss(student.maps, teacher.maps)} if flow else {}
