"""Curriculum temperature: a learned temperature that raises the loss, by a weight that grows during training.

Li, Li, Yang, Zhao, Song, Luo, Li and Yang, "Curriculum Temperature for Knowledge Distillation", AAAI 2023.
https://arxiv.org/abs/2211.16231
Paper and the release's training scripts agree (its command line alone has other defaults, with which the temperature
never moves).  This is the global temperature of the paper; its variant with a temperature for each image is not here.
The temperature is trained by the student's optimizer, weight decay included, on a gradient of opposite sign.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from potstill.methods.base import Method
from potstill.methods.numerics import softened_kl
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs


@checked
def ctkd_strength(
    epoch: int,
    *,
    length: Positive = 10.0,
    low: float = -1.0,
    high: float = 0.0,
    shape: Literal["cosine", "linear"] = "cosine",
) -> float:
    r"""What the temperature's gradient is multiplied with: from ``high`` to ``low`` within ``length`` epochs.

    .. math:: \lambda(e) = \mathrm{low} + (\mathrm{high} - \mathrm{low})
        \frac{1 + \cos(\pi \min(e, L) / L)}{2}

    Args:
        epoch: e, counted from 1 in training.
        length: L, in epochs.
        low: at the end; below 0, so that the temperature climbs the loss that the student descends.
        high: at epoch 0.
        shape: "linear" is the release's other curve, which stops one step short of ``low``.

    Example:
        >>> ctkd_strength(5), ctkd_strength(10), ctkd_strength(200)
        (-0.5, -1.0, -1.0)
        >>> ctkd_strength(200, shape="linear")
        -0.9
    """
    if shape == "linear":
        return high + (low - high) * min(epoch, length - 1) / length
    return low + (high - low) * (1 + math.cos(math.pi * min(epoch, length) / length)) / 2


def ctkd_temperature(tau: Tensor, *, start: float = 1.0, span: float = 20.0) -> Tensor:
    """``start + span * sigmoid(tau)``, of tau's shape.

    Example:
        >>> ctkd_temperature(torch.tensor(0.0))
        tensor(11.)
    """
    return start + span * torch.sigmoid(tau)


@checked
def ctkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: Tensor,
    *,
    strength: float = -1.0,
    start: Positive = 1.0,
    span: Positive = 20.0,
) -> Tensor:
    r"""Hinton's loss at a learnt temperature, whose gradient is multiplied with ``strength``.

    .. math:: T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big), \quad
        T = \mathrm{start} + \mathrm{span} \cdot \sigma(\tau)

    Args:
        student_logits, teacher_logits: [B, K].
        tau: one number, the parameter behind the temperature.  The factor T squared counts in its gradient.
        strength: factor on that gradient; negative: the temperature climbs the loss.
        start: the lowest temperature.
        span: how far above it can rise.

    Example:
        >>> # T = 1 + 2 * 0.5 = 2: as in kd_loss
        >>> ctkd_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), torch.tensor(0.0), span=2.0)
        tensor(1.3113)
    """
    fixed = tau.detach()
    # The value of tau, with a gradient multiplied by strength.
    temperature = ctkd_temperature(fixed + strength * (tau - fixed), start=start, span=span).reshape(())
    return temperature.square() * softened_kl(student_logits, teacher_logits, temperature).mean()


class CTKD(Method):
    """Labels and soft targets at a temperature that works against the student: ``ce_weight * CE + weight * CTKD``."""

    name = "ctkd"
    needs = Requirements(epoch=True)

    start: Positive = option(default=1.0, doc="the lowest temperature")
    span: Positive = option(default=20.0, doc="how far above it can rise; training starts at ``start + 0.73 * span``")
    length: Epochs = option(
        default=10.0,
        of_epochs=240,
        doc="epochs until the temperature's gradient has its whole strength; 0: from the start",
    )
    strength: NonNegative = option(default=1.0, doc="strength of that gradient, as a share of the student's")
    weight: NonNegative = option(default=0.9, doc="weight of the soft targets")
    ce_weight: NonNegative = option(default=0.1, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"length": 5, "weight": 1.0, "ce_weight": 1.0},
    }

    def __post_init__(self) -> None:
        self.tau = nn.Parameter(torch.tensor(1.0))

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = ctkd_loss(
            student.logits,
            teacher.logits,
            self.tau,
            strength=ctkd_strength(self.progress + 1, length=max(self.in_epochs("length"), 1e-9), low=-self.strength),
            start=self.start,
            span=self.span,
        )
        return {"kd": self.weight * loss}
