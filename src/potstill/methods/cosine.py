"""Cosine distance: match the direction of projected embeddings, not their length.

Ranzinger, Heinrich, Kautz and Molchanov, "AM-RADIO: Agglomerative Vision Foundation Model -- Reduce All Domains Into
One", CVPR 2024.
https://arxiv.org/abs/2312.06709
Their term for the summary features of one teacher; the labels and soft targets beside it are not in the paper.  The
terms for spatial features are those of other methods.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.kd import kd_loss
from potstill.methods.numerics import require_equal_shapes
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine similarity of two embeddings, mean over the batch; in [0, 2].

    .. math:: \frac{1}{B} \sum_b \Big(1 - \frac{s_b \cdot t_b}{\lVert s_b \rVert \lVert t_b \rVert}\Big)

    Args:
        student: projected embeddings [B, D].
        teacher: embeddings [B, D].

    Example:
        >>> import torch
        >>> cosine_loss(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]]))  # 1 and 0
        tensor(0.5000)
    """
    require_equal_shapes(student, teacher, "cosine: the embeddings")
    return (1 - F.cosine_similarity(at_least_float32(student), at_least_float32(teacher.detach()), dim=1)).mean()


class Cosine(Method):
    """Labels, soft targets and the direction of the embeddings: ``CE + kd_weight * KD + weight * COSINE``."""

    name = "cosine"
    weight: NonNegative = option(default=1.0, doc="weight of the cosine distance")
    kd_weight: NonNegative = option(default=1.0, doc="weight of the soft targets")
    temperature: Positive = option(default=1.0, doc="T of the soft targets")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        self.needs = Requirements(embedding=True, several=True, soft_targets=self.kd_weight > 0)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.outputs.embedding is not None
        assert teacher.outputs.embedding is not None
        inputs, outputs = student.outputs.embedding.shape[1], teacher.outputs.embedding.shape[1]
        # The paper's adaptor; it is removed after the training.
        self.project = nn.Sequential(
            nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU(), nn.Linear(outputs, outputs)
        )

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert teacher.embedding is not None
        terms = {"embedding": self.weight * cosine_loss(self.project(student.embedding), teacher.embedding)}
        if self.kd_weight:
            terms["kd"] = self.kd_weight * kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        return terms
