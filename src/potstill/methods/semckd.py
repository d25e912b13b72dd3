"""SemCKD: trained attention weighs, for each image, the teacher stages that each student stage is matched with.

Chen, Mei, Zhang, Wang, Wang, Feng and Chen, "Cross-Layer Distillation with Semantic Calibration", AAAI 2021.
https://arxiv.org/abs/2012.03236
The form of the released code, which divides energies by ``softness`` and not by the root of the dimension.  Its
experiments add KD with weight 1: combine with ``kd`` for that.  Queries and keys are computed from rows of the B x B
similarity matrix, so that the number of images per step is part of the architecture; in a smaller last batch, which
the released code leaves out, the images that are missing resemble none.  There are as many projections as
pairs of stages, each twice as wide as the teacher's stage: wide teachers make it the most expensive method here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features import pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32


def semckd_loss(
    projected: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]], attention: Tensor
) -> Tensor:
    r"""Mean squared errors of every student stage to every teacher stage, weighted for each image.

    .. math:: \frac{1}{B S} \sum_{b,s,t} \alpha_{bst} \, \mathrm{MSE}(P_{st}(F_s), F_t)_b

    Args:
        projected: [student stage][teacher stage] -> [B, C, H, W].
        targets: likewise, the teacher's maps.
        attention: [B, S, T], at least 0, sums to 1 over the teacher's stages.

    Example:
        >>> zero, two = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
        >>> semckd_loss([[zero, zero]], [[zero, two]], torch.tensor([[[0.75, 0.25]]]))  # 0.25 * 2^2
        tensor(1.)
    """
    errors = [
        torch.stack(
            [
                (at_least_float32(ours) - at_least_float32(theirs.detach())).square().flatten(1).mean(dim=1)
                for ours, theirs in zip(row, wanted, strict=True)
            ],
            dim=1,
        )
        for row, wanted in zip(projected, targets, strict=True)
    ]
    return (attention * torch.stack(errors, dim=1)).sum() / (attention.shape[0] * attention.shape[1])


class Embedding(nn.Module):
    """Rows of a similarity matrix [B, B] to vectors [B, d] of length 1, d = B / factor."""

    def __init__(self, batch: int, factor: int) -> None:
        super().__init__()
        dimension = max(1, batch // factor)
        self.linear1 = nn.Linear(batch, 2 * dimension)
        self.linear2 = nn.Linear(2 * dimension, dimension)

    def forward(self, similarity: Tensor) -> Tensor:
        similarity = F.pad(similarity, (0, self.linear1.in_features - len(similarity)))
        vectors = at_least_float32(self.linear2(torch.relu(self.linear1(similarity))))
        return F.normalize(vectors, dim=1)


class StageProjection(nn.Module):
    """Three convolutions from the student's channels to the teacher's, through twice as many."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 2 * outputs, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * outputs)
        self.conv2 = nn.Conv2d(2 * outputs, 2 * outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * outputs)
        self.conv3 = nn.Conv2d(2 * outputs, outputs, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        features = torch.relu(self.norm1(self.conv1(features)))
        projected: Tensor = self.conv3(torch.relu(self.norm2(self.conv2(features))))
        return projected


class Calibration(nn.Module):
    """Which stage learns from which, and the projections between them."""

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, batch: int, factor: int
    ) -> None:
        super().__init__()
        self.queries = nn.ModuleList(Embedding(batch, factor) for _ in student_channels)
        self.keys = nn.ModuleList(Embedding(batch, factor) for _ in teacher_channels)
        self.projections = nn.ModuleList(
            nn.ModuleList(StageProjection(ours, theirs) for theirs in teacher_channels) for ours in student_channels
        )

    def attention(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], softness: float) -> Tensor:
        """Shape [B, S, T]; energies are divided by ``softness``."""
        queries = [embed(_similarity(features)) for embed, features in zip(self.queries, student_maps, strict=True)]
        keys = [embed(_similarity(features.detach())) for embed, features in zip(self.keys, teacher_maps, strict=True)]
        energies = torch.stack(queries, dim=1) @ torch.stack(keys, dim=1).transpose(1, 2)
        return torch.softmax(at_least_float32(energies) / softness, dim=2)

    def forward(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Projected maps and their targets, [student stage][teacher stage]; the larger of two maps is averaged down."""
        projected: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        for row, ours in zip(self.projections, student_maps, strict=True):
            assert isinstance(row, nn.ModuleList)
            pairs = [pool_to_common_size(ours, theirs) for theirs in teacher_maps]
            projected.append([project(features) for project, (features, _) in zip(row, pairs, strict=True)])
            targets.append([target for _, target in pairs])
        return projected, targets


def _similarity(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return inner_products(flat, flat)


class SemCKD(Method):
    """Labels and all stages, weighted for each image: ``CE + weight * SemCKD``."""

    name = "semckd"
    needs = Requirements(maps="all", batch_size=True, several=True)

    weight: NonNegative = option(default=400.0, doc="weight of the stages")
    softness: Positive = option(
        default=1.0, doc="softness of the choice among the teacher's stages; energies are divided by it"
    )
    reduction: Count = option(default=4, doc="the batch by the dimension of queries and keys, which is 2 at least")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = ([features.shape[1] for features in side.outputs.maps] for side in (student, teacher))
        # In a loop of the user's own the example is a batch like those to come.
        self.batch_size = training.batch_size or len(student.outputs.logits)
        # A vector of one dimension and length 1 has nothing to learn.
        factor = min(self.reduction, max(1, self.batch_size // 2))
        self.calibration = Calibration(ours, theirs, batch=self.batch_size, factor=factor)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if len(batch) > self.batch_size:
            raise UsageError(
                f"semckd was built for {self.batch_size} images a step and got {len(batch)}: its layers read rows of a "
                "B x B matrix. Give an example batch of the largest size"
            )
        attention = self.calibration.attention(student.maps, teacher.maps, self.softness)
        projected, targets = self.calibration(student.maps, teacher.maps)
        return {"semckd": self.weight * semckd_loss(projected, targets, attention)}
