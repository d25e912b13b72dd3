"""Simple recipe distillation: linear projection, batch normalisation, and a log-sum of powers of the differences.

Miles and Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024.
https://arxiv.org/abs/2303.11098
The form of the released ImageNet code; that for DeiT students correlates features instead.  Equal features have the
smallest finite logarithm, not minus infinity.
"""

import torch
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.kd import kd_loss
from potstill.methods.numerics import require_equal_shapes
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def srd_loss(student: Tensor, teacher: Tensor, *, exponent: Positive = 4.0) -> Tensor:
    r"""Logarithm of the summed powers of the differences, over features and batch.

    .. math:: \log \sum_{b,d} \lvert s_{bd} - t_{bd} \rvert^p

    Args:
        student: projected and normalised embeddings [B, D].
        teacher: normalised embeddings [B, D].
        exponent: p; larger values attend to the largest differences.

    Example:
        >>> srd_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # ln(1 + 16)
        tensor(2.8332)
    """
    require_equal_shapes(student, teacher, "srd: the embeddings")
    difference = (at_least_float32(student) - at_least_float32(teacher.detach())).abs()
    total = difference.pow(exponent).sum()
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


class SRD(Method):
    """Labels, soft targets and projected embeddings: ``CE + kd_weight * KD + weight * SRD``."""

    name = "srd"
    weight: NonNegative = option(default=2.0, doc="weight of the embeddings' difference")
    exponent: Positive = option(default=4.0, doc="p of the differences")
    kd_weight: NonNegative = option(default=1.0, doc="weight of the soft targets")
    temperature: Positive = option(default=1.0, doc="T of the soft targets")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        self.needs = Requirements(embedding=True, several=True, soft_targets=self.kd_weight > 0)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.outputs.embedding is not None
        assert teacher.outputs.embedding is not None
        width = teacher.outputs.embedding.shape[1]
        self.project = nn.Linear(student.outputs.embedding.shape[1], width)
        self.norm_student = nn.BatchNorm1d(width, eps=1e-4, affine=False)
        self.norm_teacher = nn.BatchNorm1d(width, eps=1e-4, affine=False)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert teacher.embedding is not None
        ours = self.norm_student(at_least_float32(self.project(student.embedding)))
        theirs = self.norm_teacher(at_least_float32(teacher.embedding))
        terms = {"embedding": self.weight * srd_loss(ours, theirs, exponent=self.exponent)}
        if self.kd_weight:
            terms["kd"] = self.kd_weight * kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        return terms
