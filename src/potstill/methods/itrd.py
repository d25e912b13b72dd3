"""Information theoretic representation distillation: correlate features, and match the similarities between images.

Miles, Lopez Rodriguez and Mikolajczyk, "Information Theoretic Representation Distillation", BMVC 2022.
https://arxiv.org/abs/2112.00459
As released, the standard deviation divides by B - 1 and the correlation by B, so that even equal features correlate
by (B - 1) / B only.  A feature that is the same in all images of a batch correlates by 0 (NaN in the release).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products, require_equal_shapes, require_two_images
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def itrd_correlation_loss(student: Tensor, teacher: Tensor, *, alpha: Positive = 1.5) -> Tensor:
    r"""Logarithm of how far each feature is from correlating with the teacher's over the batch.

    .. math:: \log_2 \sum_d \lvert c_d - 1 \rvert^{2 \alpha}, \quad
        c_d = \frac{1}{B} \sum_b \frac{s_{bd} - \bar s_d}{\sigma(s_d)} \frac{t_{bd} - \bar t_d}{\sigma(t_d)}

    Args:
        student: embeddings [B, D], already of the teacher's width.
        teacher: embeddings [B, D].
        alpha: half the exponent.

    Example:
        >>> both = torch.tensor([[0.0], [1.0]])  # deviations -0.5, 0.5; sigma 0.7071: c = (0.5 + 0.5) / 2
        >>> itrd_correlation_loss(both, both)  # log2 of 0.5^3
        tensor(-3.)
    """
    require_two_images(student, "itrd")
    require_equal_shapes(student, teacher, "itrd: the embeddings")
    correlation = (_standardised(student) * _standardised(teacher.detach())).mean(dim=0)
    distance = (correlation - 1).abs().pow(2 * alpha).sum()
    return distance.clamp(min=torch.finfo(distance.dtype).tiny).log2()


def itrd_mutual_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Entropy of the images' similarities to the student beyond that which the teacher shares.

    .. math:: \lVert G_s \rVert_F^2 - \lVert G_{st} \rVert_F^2

    with :math:`G_s` the cosines between the student's embeddings, :math:`G_{st}` those times the teacher's, each
    divided by its trace.

    Args:
        student: embeddings [B, D].
        teacher: embeddings [B, D']; the widths may differ.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # cosines all 1, trace 2: 4 (1/2)^2
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # product: the unit matrix: 2 (1/2)^2
        >>> itrd_mutual_loss(student, teacher)
        tensor(0.5000)
    """
    require_two_images(student, "itrd")
    ours, theirs = (F.normalize(at_least_float32(rows), dim=1) for rows in (student, teacher.detach()))
    own = inner_products(ours, ours)
    shared = own * inner_products(theirs, theirs)
    tiny = torch.finfo(own.dtype).tiny  # a batch of embeddings of zeros has no similarities
    own, shared = own / own.trace().clamp(min=tiny), shared / shared.trace().clamp(min=tiny)
    return (own.square() - shared.square()).sum()


def _standardised(embedding: Tensor) -> Tensor:
    rows = at_least_float32(embedding)
    variance, mean = torch.var_mean(rows, dim=0)
    return (rows - mean) / variance.clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


class ITRD(Method):
    """Labels plus correlated and alike embeddings: ``CE + correlation_weight * L_corr + mutual_weight * L_mutual``.

    The student's embedding passes a trained linear layer to the teacher's width: always for the correlation, where
    the widths differ for the similarities.
    """

    name = "itrd"
    needs = Requirements(embedding=True, several=True)

    correlation_weight: NonNegative = option(default=2.0, doc="weight of the features' correlation")
    mutual_weight: NonNegative = option(default=1.0, doc="weight of the images' similarities")
    alpha: Positive = option(default=1.5, doc="half the exponent of the correlation")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.outputs.embedding is not None
        assert teacher.outputs.embedding is not None
        self.embed = nn.Linear(student.outputs.embedding.shape[1], teacher.outputs.embedding.shape[1])

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.embedding is not None
        assert teacher.embedding is not None
        embedded = self.embed(student.embedding)
        alike = embedded if student.embedding.shape != teacher.embedding.shape else student.embedding
        correlation = itrd_correlation_loss(embedded, teacher.embedding, alpha=self.alpha)
        return {
            "correlation": self.correlation_weight * correlation,
            "mutual": self.mutual_weight * itrd_mutual_loss(alike, teacher.embedding),
        }
