"""ESKD: distil in the first epochs only, then train on labels alone.

Cho and Hariharan, "On the Efficacy of Knowledge Distillation", ICCV 2019.  https://arxiv.org/abs/1910.01348
The paper's other half, a teacher whose own training stops early, is ``teacher.training.epochs``.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from potstill.methods import create_method
from potstill.methods.wrappers import MethodWrapper
from potstill.options import MethodSettings, Share, option
from potstill.types import Batch, Outputs


class ESKD(MethodWrapper):
    """What ``base_method`` does until the share ``stop`` of the epochs, plain cross-entropy from there on."""

    name = "eskd"

    base_method: MethodSettings = option(
        default={"name": "kd", "preset": "cifar100"}, doc="the method that is stopped: name and options"
    )
    stop: Share = option(default=0.5, doc="share of the epochs with a teacher; 1 never stops")

    def __post_init__(self) -> None:
        self.wrap(create_method(**self.base_method))
        self.needs = replace(self.inner.needs, epoch=True)

    @property
    def label_weight(self) -> float:
        return self.inner.label_weight if self.stop == 1 else 1.0  # of labels alone, after the stop

    @property
    def stopped(self) -> bool:
        """Whether the teacher is no longer heard."""
        return self.progress >= self.stop * (self.epochs or 1)

    @property
    def staged(self) -> bool:
        return True

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        if self.training and self.stopped:
            return {"ce": self.label_loss(student.logits, batch.targets)}
        return super().label_terms(student, batch)

    def distill(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        if self.training and self.stopped:
            return {}
        return super().distill(student, teacher, batch)
