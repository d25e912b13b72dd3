"""Logit standardisation: scale the logits of both networks to mean 0 and deviation 1 before another method's loss.

Sun, Ren, Li, Wang and Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024.
https://arxiv.org/abs/2403.01427
Paper and release agree.  The deviation is the unbiased one (over K - 1), and 1e-7 is added to it, not to the variance.
Standardised logits all have one scale, so a temperature here is not comparable with one on plain logits.
"""

from typing import Any, ClassVar

from torch import Tensor

from potstill.errors import UsageError
from potstill.methods import create_method
from potstill.methods.base import Method
from potstill.methods.wrappers import MethodWrapper, refuse_idle_label_weight
from potstill.options import MethodSettings, NonNegative, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def standardise(logits: Tensor, *, eps: NonNegative = 1e-7) -> Tensor:
    r"""Each row minus its mean, divided by its deviation.

    .. math:: N(z) = \frac{z - \bar z}{\epsilon + s}, \quad s^2 = \frac{1}{K - 1} \sum_k (z_k - \bar z)^2

    With two classes every row becomes (0.7071, -0.7071) or its opposite: nothing but the order is left, and no
    gradient.  A row of equal logits becomes 0.

    Args:
        logits: shape [B, K], K of 2 or more; gradients reach them.
        eps: added to the deviation.

    Returns:
        Shape [B, K], in at least float32.

    Raises:
        UsageError: ``eps`` is below 0.

    Example:
        >>> import torch
        >>> standardise(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])).round()  # mean 2, deviation 1; both alike
        tensor([[-1.,  0.,  1.],
                [-1.,  0.,  1.]])
    """
    logits = at_least_float32(logits)
    deviation = logits.std(dim=1, keepdim=True, correction=1)
    return (logits - logits.mean(dim=1, keepdim=True)) / (eps + deviation)


class LS(MethodWrapper):
    """``ce_weight * CE`` on plain logits plus ``weight`` times the inner method's terms on standardised ones."""

    name = "ls"

    base_method: MethodSettings = option(
        default={"name": "kd", "temperature": 2.0, "alpha": 0.0},
        doc="the method that compares the logits: name and options. Its own label weight does not count; kd's alpha "
        "is best 0, so that its term counts in full.",
    )
    weight: NonNegative = option(
        default=9.0, doc="weight of the inner method's terms; the release multiplies DKD's alpha and beta by the same 9"
    )
    ce_weight: NonNegative = option(
        default=0.1, doc="weight of the label term; 0.1 for KD on CIFAR and 1 for DKD in the release"
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"base_method": {"name": "kd", "temperature": 2.0, "alpha": 0.0}},
        "cifar100/vgg13-vgg8": {"base_method": {"name": "kd", "temperature": 3.0, "alpha": 0.0}},
        "imagenet/resnet34-resnet18": {"ce_weight": 1.0},
        "imagenet/resnet50-mobilenetv1": {"ce_weight": 0.5},
    }

    def __post_init__(self) -> None:
        self.wrap(create_method(**self.base_method))
        name = self.base_method["name"]
        refuse_idle_label_weight(self.base_method, self.inner, "ls")
        if any(hasattr(method, "standardise") for method in self.inner.modules()):
            raise UsageError(f"{name} standardises some of its terms only: use it alone, with standardise: true")
        if getattr(self.inner, "confidence", "none") != "none":
            raise UsageError(f"ls standardises the logits that {name}'s confidence is computed from: leave it out")
        if not self.inner.needs.logits_only or self.inner.student_taps:
            raise UsageError(f"ls standardises logits, and {name} compares other things; use it around kd or dkd")

    @property
    def label_weight(self) -> float:
        return self.ce_weight

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return Method.label_terms(self, student, batch)

    def plain_label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return Method.plain_label_terms(self, student, batch)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if student.logits.shape[1] < 3:
            raise UsageError(
                "ls makes all logits of two classes alike: nothing is left to learn. Use method kd (without labels: "
                "--method kd --alpha 0)"
            )
        terms = self.inner.distill(student.with_logits(standardise), teacher.with_logits(standardise), batch)
        return {name: self.weight * term for name, term in terms.items()}
