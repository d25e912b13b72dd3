"""AFD: trained attention weighs, for each image, all pairs of a teacher stage and a student stage.

Ji, Heo and Park, "Show, Attend and Distill: Knowledge Distillation via Attention-Based Feature Matching", AAAI 2021.
https://arxiv.org/abs/2102.02973
The authors' released form.  Their script adds KD (T = 4) to it: combine with ``kd`` for that.  (Another method of the
same short name, attention feature distillation by gates, is not meant.)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def afd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], attention: Tensor) -> Tensor:
    r"""Squared differences of normalised energy maps between every two stages, weighted for each image.

    .. math:: \sum_t \frac{1}{B} \sum_{b,s} \alpha_{bts} \overline{(v_s - v_t)^2}, \qquad
        v = \frac{u}{\lVert u \rVert_2}, \quad u_{hw} = \frac{1}{C} \sum_c F_{chw}^2

    The student's energies are averaged to the size of the teacher's map (or repeated, where they are fewer).

    Args:
        student_maps: S maps, each of [B, C, H, W].
        teacher_maps: T maps.
        attention: [B, T, S], at least 0, sums to 1 over the student's stages.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> afd_loss([student, teacher], [teacher], torch.tensor([[[0.25, 0.75]]]))  # 0.25 * mean of (1, 1)
        tensor(0.2500)
    """
    terms = []
    energies = [at_least_float32(features).square().mean(dim=1, keepdim=True) for features in student_maps]
    for position, features in enumerate(teacher_maps):
        wanted = at_least_float32(features.detach()).square().mean(dim=1)
        size = (wanted.shape[1], wanted.shape[2])
        ours = torch.stack([F.adaptive_avg_pool2d(energy, size).flatten(1) for energy in energies], dim=1)
        difference = F.normalize(ours, dim=2) - F.normalize(wanted.flatten(1), dim=1).unsqueeze(1)
        terms.append((attention[:, position] * difference.square().mean(dim=2)).sum(dim=1).mean())
    return torch.stack(terms).sum()


class StageAttention(nn.Module):
    """Queries from the teacher's pooled maps, keys from the student's, and a learnt code for each stage."""

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, dimension: int) -> None:
        super().__init__()
        self.queries = nn.ModuleList(_layer(channels, dimension) for channels in teacher_channels)
        self.keys = nn.ModuleList(_layer(channels, dimension) for channels in student_channels)
        self.bilinear = _layer(dimension, dimension * len(teacher_channels))
        self.teacher_codes = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(teacher_channels), dimension)))
        self.student_codes = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(student_channels), dimension)))

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Shape [B, T, S]; sums to 1 over the student's stages."""
        pooled_teacher = [features.detach().mean(dim=(2, 3)) for features in teacher_maps]
        pooled_student = [features.mean(dim=(2, 3)) for features in student_maps]
        queries = torch.stack([layer(pooled) for layer, pooled in zip(self.queries, pooled_teacher, strict=True)], 1)
        keys = torch.stack([layer(pooled) for layer, pooled in zip(self.keys, pooled_student, strict=True)], 1)
        batch, stages, dimension = keys.shape
        # One key of each student stage for each teacher stage.
        keys = self.bilinear(keys.relu().reshape(batch * stages, dimension)).view(batch, stages, -1, dimension)
        queries, keys = at_least_float32(queries), at_least_float32(keys)
        with torch.autocast(queries.device.type, enabled=False):  # it would lower products to half precision
            fit = torch.einsum("bstd,btd->bts", keys, queries) + self.teacher_codes @ self.student_codes.T
        return torch.softmax(fit / math.sqrt(dimension), dim=2)


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))


class AFD(Method):
    """Labels and attended stages: ``CE + weight * AFD``."""

    name = "afd"
    needs = Requirements(maps="all", several=True)

    weight: NonNegative = option(default=200.0, doc="weight of the stages")
    dimension: Count = option(default=128, doc="dimension of queries and keys")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = ([features.shape[1] for features in side.outputs.maps] for side in (student, teacher))
        if len(ours) < 2:
            raise UsageError("afd chooses among the student's stages; this one has a single stage. Use at")
        self.attention = StageAttention(ours, theirs, dimension=self.dimension)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        attention = self.attention(student.maps, teacher.maps)
        return {"afd": self.weight * afd_loss(student.maps, teacher.maps, attention)}
