"""OFA-KD: match logits that each stage of the student predicts, so that teachers of any architecture can be used.

Hao, Guo, Han, Tang, Hu, Wang and Xu, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
Distillation", NeurIPS 2023.  https://arxiv.org/abs/2310.19444
A small trained head on each stage's map (depthwise separable convolutions with stride 2, mean, linear layer) is dropped
after training; tokens are read as a map, where the release gives transformers heads of transformer blocks.  Default is
the release, from which the published numbers come: it raises the probabilities of all classes to the power epsilon.
``form="paper"`` does so with the labelled class alone, and adds the label to the stages' targets too.  The release
takes the logarithm of probabilities that can round to 0; here it stays finite, with equal values elsewhere.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def ofa_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    epsilon: Positive = 1.0,
    temperature: Positive = 1.0,
    form: Literal["release", "paper"] = "release",
) -> Tensor:
    r"""Cross-entropy with soft targets in which the labelled class is enhanced; batch mean, without factor :math:`T^2`.

    .. math:: -\frac{1}{B} \sum_{bk} \big[(p_{bk} + 1_{k=y})^\epsilon - 1_{k=y}\big]
        \log \mathrm{softmax}(z_s / T)_{bk}, \quad p = \mathrm{softmax}(z_t / T)

    The label's own share, 1, is taken off again: it is the cross-entropy that is a term of its own.

    Args:
        student_logits: [B, K], of the student or of one stage.
        teacher_logits: [B, K].
        labels: [B], int64 class ids.
        epsilon: 1 leaves the soft targets as they are; more enhances the label where the teacher is sure of it.
        form: "paper" raises the labelled class to the power epsilon and leaves the others.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])
        >>> # targets 1.5^2 - 1 and 0.5^2: 1.5 ln 2; in the paper's form 1.25 + 0.5
        >>> ofa_loss(student, teacher, torch.tensor([0]), epsilon=2.0)
        tensor(1.0397)
        >>> ofa_loss(student, teacher, torch.tensor([0]), epsilon=2.0, form="paper")
        tensor(1.2130)
    """
    log_probs = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher_probabilities = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    label = F.one_hot(labels, teacher_probabilities.shape[1]).to(teacher_probabilities.dtype)
    enhanced = (teacher_probabilities + label) ** epsilon - label
    targets = enhanced if form == "release" else torch.where(label.bool(), enhanced, teacher_probabilities)
    return -(targets * log_probs).sum(dim=1).mean()


class OFA(Method):
    """Labels, enhanced soft targets, and these for every stage:
    ``CE + weight * OFA + stage_weight * sum over stages``.
    """

    name = "ofa"
    needs = Requirements(maps="all", classes=True, labels=True, soft_targets=True)

    weight: NonNegative = option(default=1.0, doc="weight of the student's own logits")
    stage_weight: NonNegative = option(default=1.0, doc="weight of each stage's logits")
    epsilon: Positive = option(default=1.0, doc="power of the enhanced targets")
    temperature: Positive = option(default=1.0, doc="T of all of them")
    form: Literal["release", "paper"] = option(
        default="release", doc='"release", or "paper": only the label is enhanced, and is a target of the stages too'
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        widths = [each.shape[1] for each in student.outputs.maps]
        self.heads = nn.ModuleList(
            stage_head(widths[position:], training.classes) for position in range(len(widths))
        )  # fmt: skip

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        stage_logits = [head(features) for head, features in zip(self.heads, student.maps, strict=True)]
        stages = [self._loss(logits, teacher, batch) for logits in stage_logits]
        if self.form == "paper":
            stages += [
                F.cross_entropy(at_least_float32(logits) / self.temperature, batch.labels) for logits in stage_logits
            ]
        return {
            "ofa": self.weight * self._loss(student.logits, teacher, batch),
            "stages": self.stage_weight * torch.stack(stages).sum(),
        }

    def _loss(self, logits: Tensor, teacher: Outputs, batch: Batch) -> Tensor:
        options = {"epsilon": self.epsilon, "temperature": self.temperature}
        return ofa_loss(logits, teacher.logits, batch.labels, **options, form=self.form)


def stage_head(widths: list[int], classes: int) -> nn.Sequential:
    """From a stage's map to logits: one halving for every stage behind it, to that stage's width.

    Example:
        >>> stage_head([8, 16, 32], 5)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 5])
    """
    halvings = [_halving(inputs, outputs) for inputs, outputs in pairwise(widths)]
    return nn.Sequential(*halvings, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def _halving(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, kernel_size=3, stride=2, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
