"""MLLD: match logits at several temperatures: by image, between images of a batch, and between classes.

Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023.
https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
Every image is seen twice: in its usual view and with strong augmentation on top.  Default is the release, from which
all published numbers come, also those of logit standardisation (``standardise``).  It differs from its names:
terms of the usual view are multiplied by the share of images (classes) of which the teacher is no surer than in the
median, instead of leaving the others out; for two of five temperatures the strong view's divergence reads the usual
view; and the strong view's relations are left out.  ``form="paper"`` has all three levels in both views, unmasked.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.kd import kd_loss
from potstill.methods.ls import standardise as standardised
from potstill.methods.numerics import inner_products
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32

FURTHER_TEMPERATURES = (3.0, 5.0, 2.0, 6.0)  # besides the one that is an option
View = tuple[Tensor, Tensor]  # logits of student and teacher, each [B, K]
MISREAD = 2  # so many of the last temperatures compare the usual view in place of the strong one, as released


@checked
def mlld_batch_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive) -> Tensor:
    r"""Squared distance between the relations of images: which of them have similar predictions.

    .. math:: \frac{1}{B} \big\| P_t P_t^\top - P_s P_s^\top \big\|_F^2, \quad P = \mathrm{softmax}(z / T)

    Args:
        student_logits, teacher_logits: [B, K].
        temperature: T > 0; there is no factor :math:`T^2`.

    Example:
        >>> import torch
        >>> # one image: student 1/4 + 1/4 = 1/2, teacher 9/16 + 1/16 = 5/8
        >>> mlld_batch_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), temperature=1.0)
        tensor(0.0156)
    """
    ours, theirs = _probabilities(student_logits, teacher_logits, temperature)
    return (inner_products(theirs, theirs) - inner_products(ours, ours)).square().sum() / len(ours)


@checked
def mlld_class_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive) -> Tensor:
    r"""Squared distance between the relations of classes: which of them are predicted together.

    .. math:: \frac{1}{K} \big\| P_t^\top P_t - P_s^\top P_s \big\|_F^2, \quad P = \mathrm{softmax}(z / T)

    Args:
        student_logits, teacher_logits: [B, K].
        temperature: T > 0; there is no factor :math:`T^2`.

    Example:
        >>> import torch
        >>> # differences 9/16 - 1/4, 1/16 - 1/4 and twice 3/16 - 1/4; 0.140625 over two classes
        >>> mlld_class_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), temperature=1.0)
        tensor(0.0703)
    """
    ours, theirs = (each.T for each in _probabilities(student_logits, teacher_logits, temperature))
    return (inner_products(theirs, theirs) - inner_products(ours, ours)).square().sum() / len(ours)


def _probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    return F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)


class MLLD(Method):
    """Labels and three levels of logits, in two views: ``ce_weight * CE + kd_weight * sum over T of all levels``.

    ``ce_weight`` counts in both views; the strong view's cross-entropy is the term ``ce_strong``.
    """

    name = "mlld"
    needs = Requirements(second="strong", labels=True, several=True)

    temperature: Positive = option(default=4.0, doc="the first T; 3, 5, 2 and 6 follow")
    kd_weight: NonNegative = option(default=0.9, doc="weight of each level")
    standardise: bool = option(
        default=False,
        doc="logits in the image level only, as in the release of logit standardisation (which has ``temperature=2`` "
        "and ``kd_weight=9``)",
    )
    form: Literal["release", "paper"] = option(
        default="release", doc='"release", or "paper": all levels in both views, without masks'
    )
    ce_weight: NonNegative = option(default=0.1, doc="weight of the label term, in each view")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
        "imagenet": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5},
    }

    @property
    def label_term_names(self) -> frozenset[str]:
        return frozenset({"ce", "ce_strong"})

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.second is not None
        assert teacher.second is not None
        weak, strong = (student.logits, teacher.logits), (student.second.logits, teacher.second.logits)
        levels = (self._released if self.form == "release" else self._all)(weak, strong)
        terms = {"ce_strong": self.ce_weight * self.label_loss(student.second.logits, batch.targets)}
        return terms | {name: self.kd_weight * level for name, level in levels.items()}

    def _released(self, weak: View, strong: View) -> dict[str, Tensor]:
        confidence = F.softmax(at_least_float32(weak[1].detach()), dim=1)
        images = _share_up_to_median(confidence.max(dim=1).values)
        classes = _share_up_to_median(confidence.sum(dim=0))
        usual, read = [weak] * self._count, [strong] * (self._count - MISREAD) + [weak] * MISREAD
        return {
            "kd": images * self._image_level(usual) + self._image_level(read),
            "batch_relation": images * self._level(mlld_batch_loss, usual),
            "class_relation": classes * self._level(mlld_class_loss, usual),
        }

    def _all(self, weak: View, strong: View) -> dict[str, Tensor]:
        views = [[view] * self._count for view in (weak, strong)]
        return {
            "kd": self._image_level(views[0]) + self._image_level(views[1]),
            "batch_relation": self._level(mlld_batch_loss, views[0]) + self._level(mlld_batch_loss, views[1]),
            "class_relation": self._level(mlld_class_loss, views[0]) + self._level(mlld_class_loss, views[1]),
        }

    @property
    def _count(self) -> int:
        return 1 + len(FURTHER_TEMPERATURES)

    def _image_level(self, views: Sequence[View]) -> Tensor:
        if self.standardise:
            views = [(standardised(student), standardised(teacher)) for student, teacher in views]
        return self._level(kd_loss, views)

    def _level(self, loss: Callable[..., Tensor], views: Sequence[View]) -> Tensor:
        """The sum of a loss over the temperatures, at each of which one view is compared."""
        temperatures = (self.temperature, *FURTHER_TEMPERATURES)
        parts = [loss(*view, temperature=each) for view, each in zip(views, temperatures, strict=True)]
        return torch.stack(parts).sum()


def _share_up_to_median(confidence: Tensor) -> Tensor:
    """Which share of the values is at most the median (of an even number: midway between the two in the middle)."""
    return (confidence <= confidence.quantile(0.5)).to(confidence.dtype).mean()
