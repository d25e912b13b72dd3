"""FitNets: match one hidden layer of the teacher through a trained adapter.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.  https://arxiv.org/abs/1412.6550
The one-stage form of RepDistiller and mdistiller, whose published numbers everybody compares with; the paper trains
the hint first and distils afterwards.
"""

import torch.nn.functional as F
from torch import Tensor

from potstill.adapters import ConvAdapter
from potstill.methods.base import Method
from potstill.options import NonNegative, checked
from potstill.precision import at_least_float32
from potstill.types import Batch, Outputs


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared error over every element of two feature maps of equal shape [B, C, H, W]; a scalar.

    No gradient reaches the teacher's features.

    Example:
        >>> import torch
        >>> hint_loss(torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))  # (9 + 1) / 2
        tensor(5.)
    """
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features.detach()))


class FitNet(Method):
    """Labels plus one hint: ``CE + weight * MSE(adapter(student features), teacher features)``.

    Args:
        student_layer: path of the student's guided layer, as in ``named_modules()``; its output is [B, C, H, W].
        teacher_layer: path of the teacher's hint layer.  Its output should follow a ReLU, as the adapter's does.
        weight: of the hint; 100 in RepDistiller and mdistiller.
    """

    @checked
    def __init__(self, *, student_layer: str, teacher_layer: str, weight: NonNegative = 100.0) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_layer,), (teacher_layer,)
        self.weight = weight

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        guided, hint = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        self.adapter = ConvAdapter(guided.shape, hint.shape)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        guided, hint = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        return {
            "ce": self.label_loss(student.logits, batch.labels),
            "hint": self.weight * hint_loss(self.adapter(guided), hint),
        }
