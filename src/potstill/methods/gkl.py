"""GKL: IKL with flatter class weights, normalised over the batch and in use from the start.

Cui, Zhu, Xu, Tian, Qi, Yu, Zhang and Hong, "Generalized Kullback-Leibler Divergence Loss", 2025.
https://arxiv.org/abs/2503.08038
Paper and release agree.  The release raises weights to a power and does not bring their sum back to 1, but divides by
the sum of all their products.
"""

from typing import Any, ClassVar

from torch import Tensor

from potstill.methods.ikl import IKL, pairwise_squares
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import at_least_float32


@checked
def gkl_wmse_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, *, gamma: NonNegative = 0.05
) -> Tensor:
    r"""Weighted squared distance of all pairwise differences of logits, over the batch's sum of weights.

    .. math:: \frac{\sum_b \sum_{ij} w_{bi}^\gamma w_{bj}^\gamma \big(\Delta^t_{bij} - \Delta^s_{bij}\big)^2}
        {4 \sum_b \sum_{ij} w_{bi}^\gamma w_{bj}^\gamma}, \quad \Delta_{bij} = z_{bi} - z_{bj}

    Args:
        student_logits, teacher_logits: [B, K].
        weights: [B, K], at least 0.
        gamma: 1 leaves weights as they are, 0 makes them equal.

    Example:
        >>> import torch
        >>> # weights 2 and 1: twice 2 * 4^2 / 4 over (2 + 1)^2
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[4.0, 0.0]])
        >>> gkl_wmse_loss(student, teacher, torch.tensor([[4.0, 1.0]]), gamma=0.5)
        tensor(1.7778)
    """
    weights = at_least_float32(weights.detach()) ** gamma
    return pairwise_squares(student_logits, teacher_logits, weights).sum() / weights.sum(dim=1).square().sum()


class GKL(IKL):
    """Labels, differences of logits and soft targets: ``CE + w * (beta * wMSE + alpha * softCE)``, w rising to 1."""

    name = "gkl"

    beta: NonNegative = option(default=16.0, doc="weight of the differences")
    gamma: NonNegative = option(default=0.05, doc="power of the weights; smaller is flatter")
    weight_temperature: Positive = option(
        default=4.0, doc="T of the teacher's probabilities that weigh the differences"
    )
    class_prior: bool = option(
        default=True,
        doc="weigh by the teacher's mean probabilities of the image's class over the last epoch (in the first epoch: "
        "all classes alike) instead of by its probabilities for the image",
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet32x4-resnet8x4": {
            "temperature": 4.0,
            "alpha": 1.0,
            "beta": 16.0,
            "gamma": 0.05,
            "weight_temperature": 4.0,
            "class_prior": True,
        },
        "imagenet/resnet34-resnet18": {"beta": 0.5, "gamma": 0.6},
    }

    def wmse(self, student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
        return gkl_wmse_loss(student_logits, teacher_logits, weights, gamma=self.gamma)
