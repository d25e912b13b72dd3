"""CS-KD: no teacher; match the student's own prediction for another image of the same class.

Yun, Park, Lee and Shin, "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020.
https://arxiv.org/abs/2003.13964
Paper and release agree.  The second images go through the student in train mode, without gradient.
"""

from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.kd import kd_loss
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, option
from potstill.types import Batch, Outputs


class CSKD(Method):
    """Labels and the student's own prediction for another image of the same class: ``CE + weight * KD``.

    The loss is ``kd_loss`` with the second image's logits in the teacher's place.
    """

    name = "cskd"
    needs = Requirements(teacher=False, second="same class", second_gradient=False, labels=True)

    weight: NonNegative = option(default=1.0, doc="weight of that prediction; the paper's lambda")
    temperature: Positive = option(default=4.0, doc="T of both")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term, for the first images only")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.second is not None  # declared in `needs`
        loss = kd_loss(student.logits, student.second.logits, temperature=self.temperature)
        return {"cskd": self.weight * loss}
