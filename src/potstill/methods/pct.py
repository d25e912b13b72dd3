"""PCT: keep what the deployed model has right, beside any other method: focal distillation against negative flips.

Yan, Xiong, Kundu, Yang, Deng, Wang, Xia and Soatto, "Positive-Congruent Training: Towards Regression-Free Model
Updates", CVPR 2021.  https://arxiv.org/abs/2011.09161
A negative flip is an image that the previous model has right and the new one wrong; a higher accuracy alone does not
prevent them.  ``base`` and ``focus`` are the paper's alpha and beta: the weights of every image, and of those that the
previous model has right.  The paper trains on the term and labels alone; here it stands beside another method, whose
teacher may be right where the previous model is wrong, so that by default images that it has wrong do not count.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.methods import create_method
from potstill.methods.base import Method
from potstill.methods.numerics import softened_kl
from potstill.methods.wrappers import MethodWrapper
from potstill.options import MethodSettings, NonNegative, Positive, checked, option
from potstill.types import UNLABELED, Batch, Outputs, at_least_float32

Distance = Literal["kl", "logits"]


@checked
def pct_loss(
    student_logits: Tensor,
    previous_logits: Tensor,
    targets: Tensor,
    *,
    base: NonNegative,
    focus: NonNegative,
    temperature: Positive = 1.0,
    distance: Distance = "kl",
) -> Tensor:
    r"""Focal distillation: the distance to the previous model, more on images that it has right; batch mean.

    .. math:: \frac{1}{B} \sum_b \big(\alpha + \beta \, [\arg\max_k z_{p,bk} = y_b]\big) \, D(z_{s,b}, z_{p,b})

    The distance is :math:`T^2 \, \mathrm{KL}(\mathrm{softmax}(z_p / T) \,\|\, \mathrm{softmax}(z_s / T))` or
    :math:`\frac{1}{2} \|z_s - z_p\|^2`.  Of a mixed image the previous model has that share right that the class it
    predicts has in the mixture; of an image without a label it has nothing right.

    Args:
        student_logits: [B, K].
        previous_logits: [B, K].
        targets: [B], int64 class ids or -1, or [B, K], shares of the classes in mixed images.
        base: :math:`\alpha`.
        focus: :math:`\beta`.
        temperature: T, for "kl".
        distance: "kl" or "logits".

    Example:
        >>> import torch
        >>> student, previous = torch.zeros(2, 2), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> # 2 of each image; the first is right: (3 * 2 + 1 * 2) / 2
        >>> pct_loss(student, previous, torch.tensor([0, 1]), base=1.0, focus=2.0, distance="logits")
        tensor(4.)
    """
    student, previous = at_least_float32(student_logits), at_least_float32(previous_logits.detach())
    predicted = previous.argmax(dim=1)
    if targets.ndim == 2:
        right = targets.gather(1, predicted[:, None])[:, 0].to(student.dtype)
    else:
        right = ((predicted == targets) & (targets != UNLABELED)).to(student.dtype)
    if distance == "kl":
        each = temperature**2 * softened_kl(student, previous, temperature)
    elif distance == "logits":
        each = 0.5 * F.mse_loss(student, previous.to(student.dtype), reduction="none").sum(dim=1)
    else:
        raise UsageError(f"distance must be 'kl' or 'logits', got {distance!r}")
    return ((base + focus * right) * each).mean()


class PCT(MethodWrapper):
    """What ``base_method`` does, plus ``weight`` times the distance to the previous model where that is right.

    The previous model is the last of the teachers; the others are those of ``base_method``.  `potstill run --previous
    RUN` puts it there.
    """

    name = "pct"

    base_method: MethodSettings = option(
        default={"name": "supervised"},
        doc="the method beside it, which compares logits or has no teacher: name and options",
    )
    weight: NonNegative = option(default=1.0, doc="weight of the term against negative flips")
    base: NonNegative = option(default=0.0, doc="weight of every image in it; the paper's alpha")
    focus: NonNegative = option(
        default=1.0, doc="further weight of images that the previous model has right; the paper's beta"
    )
    distance: Distance = option(
        default="kl", doc='from the previous model: "kl" of the probabilities, or half the squares of the "logits"'
    )
    temperature: Positive = option(default=1.0, doc="T of the probabilities, for distance kl")

    def __post_init__(self) -> None:
        inner = create_method(**self.base_method)
        if inner.needs.teacher and not inner.needs.logits_only:
            raise UsageError(
                f"pct goes around a method that compares logits alone, such as kd, dkd or dist, or has no teacher; "
                f"{self.base_method['name']} reads other layers"
            )
        self.wrap(inner)
        self.needs = replace(inner.needs, teacher=True, members=True, soft_targets=True)
        self._others, self._apart = 1, False

    def for_teachers(self, shares: Sequence[float]) -> Method:
        self._others = len(shares) - 1
        if self.inner.needs.teacher and not self._others:
            raise UsageError(
                f"{self.base_method['name']} inside pct needs a teacher before the previous model, which is the last "
                "of the teachers; with labels alone beside it: base_method={'name': 'supervised'}"
            )
        # The combined outputs are those of the others where the previous model has no share in them.
        self._apart = shares[-1] == 0
        if self._others > 1 and not self._apart:
            raise UsageError("give the previous model, the last of the teachers, the weight 0 among them")
        if self.inner.needs.teacher:
            self.inner = self.inner.for_teachers(shares[:-1])
        return self

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        others: Outputs | None = None
        if self._others:
            first = teacher.members[0]
            others = (
                teacher
                if self._apart
                else replace(first, second=None if teacher.second is None else teacher.second.members[0])
            )
        terms = self.inner.distill(student, others, batch)
        loss = pct_loss(
            student.logits,
            teacher.members[-1].logits,
            batch.targets,
            base=self.base,
            focus=self.focus,
            temperature=self.temperature,
            distance=self.distance,
        )
        return terms | {"flips": self.weight * loss}
