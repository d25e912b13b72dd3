"""Dynamic temperature: a temperature for each image and network that makes both softmaxes equally sharp.

Wei and Bai, "Dynamic Temperature Knowledge Distillation", 2024.  https://arxiv.org/abs/2404.12711
Sharpness is judged by the largest logit, as in the release, where gradients also pass through the student's
temperature.  The formula has no meaning where a largest logit is not positive and no bound as one approaches 0: images
with a largest logit below 0.01, of either network, take the plain temperature for both.
"""

import torch
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.kd import kd_loss
from potstill.methods.numerics import softened_kl
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32

SMALLEST_PEAK = 0.01


@checked
def dtkd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive = 4.0) -> Tensor:
    r"""KL divergence with temperatures that share 2 T in proportion to the largest logits; batch mean.

    .. math:: T_s T_t \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T_t) \,\|\, \mathrm{softmax}(z_s / T_s)\big), \quad
        T_s = \frac{2 T m_s}{m_s + m_t}, \; T_t = \frac{2 T m_t}{m_s + m_t}, \quad m = \max_k z_k

    Args:
        student_logits, teacher_logits: [B, K].
        temperature: T > 0, the mean of the two temperatures.

    Example:
        >>> # largest logits 2 and 6 share 2 T = 2: 0.5 and 1.5.  Both softmaxes become softmax(4, 0) and agree.
        >>> dtkd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[6.0, 0.0]]), temperature=1.0)
        tensor(0.)
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    student_temperature, teacher_temperature = _shared(student, teacher, temperature)
    # The student's logits at the teacher's temperature.
    moved = student * (teacher_temperature / student_temperature)
    divergence = softened_kl(moved, teacher, teacher_temperature)[:, None]
    return (student_temperature * teacher_temperature * divergence).mean()


def _shared(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student_peak, teacher_peak = student.amax(dim=1, keepdim=True), teacher.amax(dim=1, keepdim=True)
    usable = torch.minimum(student_peak, teacher_peak) >= SMALLEST_PEAK
    student_peak = torch.where(usable, student_peak, 1.0)  # before the division, so that no gradient is infinite
    teacher_peak = torch.where(usable, teacher_peak, 1.0)
    total = student_peak + teacher_peak
    return 2 * temperature * student_peak / total, 2 * temperature * teacher_peak / total


class DTKD(Method):
    """Labels, soft targets at dynamic and at fixed temperature:
    ``CE + w * (alpha * DTKD + beta * KD)``, w rising to 1.
    """

    name = "dtkd"
    needs = Requirements(epoch=True)

    temperature: Positive = option(default=4.0, doc="T, fixed for KD and shared out in DTKD")
    alpha: NonNegative = option(default=3.0, doc="weight of the dynamic part")
    beta: NonNegative = option(default=1.0, doc="weight of the fixed part")
    warmup_epochs: Epochs = option(default=20.0, of_epochs=240, doc="until both weights are whole; 0: from the start")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        factor = self.warmup(self.in_epochs("warmup_epochs"))
        dynamic = dtkd_loss(student.logits, teacher.logits, temperature=self.temperature)
        fixed = kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        return {"dtkd": factor * self.alpha * dynamic, "kd": factor * self.beta * fixed}
