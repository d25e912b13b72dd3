"""FitNets: match one hidden layer of the teacher through a trained adapter.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.  https://arxiv.org/abs/1412.6550
The one-stage form of RepDistiller and mdistiller, whose published numbers everybody compares with; the paper trains
the hint first and distils afterwards.  They take the second of three stages; here it is the pair of stages halfway,
which other layers can replace.

Traps:
- There is no soft-target term in it: combine with ``kd`` for that.
- The weight goes with the size of the teacher's activations: 100 is for those of the CIFAR networks.
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.features import ConvAdapter
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, option
from potstill.types import Batch, Outputs, at_least_float32


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Mean squared error over every element of two feature maps of equal shape.

    .. math:: \frac{1}{B C H W} \sum (F_s - F_t)^2

    Args:
        student_features: [B, C, H, W], after the adapter.
        teacher_features: of the same shape.

    Example:
        >>> import torch
        >>> hint_loss(torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))  # (9 + 1) / 2
        tensor(5.)
    """
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features.detach()))


class FitNet(Method):
    """Labels plus one hint: ``CE + weight * MSE(adapter(student features), teacher features)``.

    The teacher's map should follow a ReLU, as the adapter's output does.
    """

    name = "fitnet"
    needs = Requirements(maps="middle")

    weight: NonNegative = option(default=100.0, doc="weight of the hint; 100 in RepDistiller and mdistiller")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        (guided,), (hint,) = student.outputs.maps, teacher.outputs.maps
        self.adapter = ConvAdapter(guided.shape, hint.shape)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        (guided,), (hint,) = student.maps, teacher.maps
        return {"hint": self.weight * hint_loss(self.adapter(guided), hint)}
