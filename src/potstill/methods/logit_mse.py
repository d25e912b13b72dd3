"""Logit regression: mean squared error between logits, without a softmax.

Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014.  https://arxiv.org/abs/1312.6184
The form of the common toolboxes, a mean over images and classes; the paper sums over classes and halves.  Unlike every
loss on probabilities it also requires the teacher's offset, the same number added to all logits of an image.
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean squared difference of the logits.

    .. math:: \frac{1}{B K} \sum_{b,k} (z_{s,k} - z_{t,k})^2

    Logits are [B, K].

    Example:
        >>> import torch
        >>> logit_mse_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))  # (9 + 1) / 2
        tensor(5.)
    """
    return F.mse_loss(at_least_float32(student_logits), at_least_float32(teacher_logits.detach()))


class LogitMSE(Method):
    """Labels and the teacher's logits: ``CE + weight * MSE(student logits, teacher logits)``."""

    name = "logit_mse"

    weight: NonNegative = option(default=1.0, doc="weight of the squared difference")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"logit_mse": self.weight * logit_mse_loss(student.logits, teacher.logits)}
