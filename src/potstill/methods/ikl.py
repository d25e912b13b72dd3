"""IKL: match the differences between all pairs of logits, weighted by the probabilities of both classes.

Cui, Tian, Zhong, Qi, Yu and Zhang, "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024.
https://arxiv.org/abs/2305.13948
Paper and release agree.  The differences are those of raw logits, without temperature, and the soft targets' part is a
cross-entropy without the factor T squared.  The double sum over classes is computed as a variance, from B K numbers.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


class ClassPrior(nn.Module):
    """One row of probabilities for each class: uniform at first, then the mean over the last epoch's images.

    Args:
        classes: K.

    Example:
        >>> prior = ClassPrior(2)
        >>> prior.add(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 0]))
        >>> prior.turn()
        >>> prior(torch.tensor([0, 1]))  # class 1 has not occurred, so its row stays
        tensor([[0.7000, 0.3000],
                [0.5000, 0.5000]])
    """

    rows: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.full((classes, classes), 1 / classes))
        self.register_buffer("sums", torch.zeros(classes, classes))
        self.register_buffer("counts", torch.zeros(classes))

    def forward(self, labels: Tensor) -> Tensor:
        """The rows of these classes: int64 [B] -> [B, K]."""
        return self.rows[labels]

    @torch.no_grad()
    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Gather a batch [B, K] for the next epoch."""
        self.sums.index_add_(0, labels, probabilities.to(self.sums.dtype))
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))

    @torch.no_grad()
    def turn(self) -> None:
        """Begin to use what was gathered, and to gather anew; a class that was not seen keeps its row."""
        seen = (self.counts > 0)[:, None]
        self.rows.copy_(torch.where(seen, self.sums / self.counts.clamp(min=1)[:, None], self.rows))
        self.sums.zero_()
        self.counts.zero_()


def ikl_wmse_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted squared distance of all pairwise differences of logits; batch mean.

    .. math:: \frac{1}{4 B} \sum_b \sum_{ij} w_{bi} w_{bj} \big(\Delta^t_{bij} - \Delta^s_{bij}\big)^2,
        \quad \Delta_{bij} = z_{bi} - z_{bj}

    Args:
        student_logits, teacher_logits: [B, K].
        weights: [B, K], at least 0, each row with the sum 1.

    Example:
        >>> import torch
        >>> # the pairs (0, 1) and (1, 0): each 1/2 * 1/2 * (4 - 0)^2 / 4
        >>> ikl_wmse_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor(2.)
    """
    return pairwise_squares(student_logits, teacher_logits, weights).mean()


@checked
def ikl_soft_ce_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive = 4.0) -> Tensor:
    r"""Cross-entropy with soft targets, without the factor :math:`T^2`; batch mean.

    .. math:: -\frac{1}{B} \sum_{bk} \mathrm{softmax}(z_t / T)_{bk} \log \mathrm{softmax}(z_s / T)_{bk}

    Logits are [B, K].

    Returns:
        A scalar, at least the entropy of the targets.

    Example:
        >>> import torch
        >>> # (3/4, 1/4) against (1/4, 3/4): 3/4 ln 4 + 1/4 ln(4/3)
        >>> student, teacher = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[3.0, 1.0]]).log()
        >>> ikl_soft_ce_loss(student, teacher, temperature=1.0)
        tensor(1.1116)
    """
    targets = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    return F.cross_entropy(at_least_float32(student_logits) / temperature, targets)


def pairwise_squares(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    r"""Return a quarter of the weighted squared distance of all pairwise differences for each image, [B]: with d = z_t
    - z_s it is half the sum of weights times the weighted squares of d around its weighted mean.
    """
    distance = at_least_float32(teacher_logits.detach()) - at_least_float32(student_logits)
    weights = weights.detach().to(distance.dtype)
    total = weights.sum(dim=1, keepdim=True)
    around = distance - (weights * distance).sum(dim=1, keepdim=True) / total
    return 0.5 * total.squeeze(1) * (weights * around.square()).sum(dim=1)


class IKL(Method):
    """Labels, differences of logits and soft targets: ``CE + w * (beta * wMSE + alpha * softCE)``, w rising to 1."""

    name = "ikl"

    temperature: Positive = option(default=4.0, doc="T of the soft targets")
    alpha: NonNegative = option(default=1.0, doc="weight of the soft targets")
    beta: NonNegative = option(default=8.0, doc="weight of the differences")
    weight_temperature: Positive = option(
        default=100.0, doc="T of the teacher's probabilities that weigh the differences"
    )
    class_prior: bool = option(
        default=False,
        doc="weigh by the teacher's mean probabilities of the image's class over the last epoch (in the first epoch: "
        "all classes alike) instead of by its probabilities for the image",
    )
    warmup_epochs: Epochs = option(default=20.0, of_epochs=240, doc="until both weights are whole; 0: from the start")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "weight_temperature": 100.0},
        "imagenet/resnet34-resnet18": {"alpha": 1.0, "beta": 0.5, "class_prior": True, "weight_temperature": 1.0},
    }

    def __post_init__(self) -> None:
        self.needs = Requirements(epoch=True, classes=self.class_prior, labels=self.class_prior)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        if self.class_prior:
            self.prior = ClassPrior(training.classes)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        if self.class_prior:
            self.prior.turn()

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        factor = self.warmup(self.in_epochs("warmup_epochs"))
        soft = ikl_soft_ce_loss(student.logits, teacher.logits, temperature=self.temperature)
        differences = self.wmse(student.logits, teacher.logits, self.weights(teacher.logits, batch.labels))
        return {"wmse": factor * self.beta * differences, "soft_ce": factor * self.alpha * soft}

    def wmse(self, student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
        """The differences' part."""
        return ikl_wmse_loss(student_logits, teacher_logits, weights)

    def weights(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weight of each class for each image, [B, K]."""
        probabilities = F.softmax(at_least_float32(teacher_logits.detach()) / self.weight_temperature, dim=1)
        if not self.class_prior:
            return probabilities
        if self.training:
            self.prior.add(probabilities, labels)
        rows: Tensor = self.prior(labels)
        return rows
