"""PS-KD: no teacher; mix the labels with the student's own predictions of the previous epoch.

Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021.
https://arxiv.org/abs/2006.12000
Paper and release agree.  Memory: twice N K numbers, for the predictions of this epoch and of the last one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import Share, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def pskd_targets(previous: Tensor, labels: Tensor, *, share: Share) -> Tensor:
    r"""Soft targets between the label and earlier predictions.

    .. math:: (1 - \alpha) \, \mathrm{onehot}(y) + \alpha \, p

    Args:
        previous: p, [B, K], probabilities.
        labels: [B], int64 class ids.
        share: :math:`\alpha`.

    Returns:
        Shape [B, K], rows with the sum 1.

    Example:
        >>> pskd_targets(torch.tensor([[0.6, 0.4]]), torch.tensor([1]), share=0.5)
        tensor([[0.3000, 0.7000]])
    """
    previous = at_least_float32(previous)
    return (1 - share) * F.one_hot(labels, previous.shape[1]).to(previous.dtype) + share * previous


def pskd_loss(student_logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy with soft targets; batch mean.

    .. math:: -\frac{1}{B} \sum_{bk} t_{bk} \log \mathrm{softmax}(z_s)_{bk}

    Args:
        student_logits: [B, K].
        targets: [B, K], rows with the sum 1.

    Returns:
        A scalar, at least the entropy of the targets.

    Example:
        >>> # 0.3 ln(4/3) + 0.7 ln 4
        >>> pskd_loss(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0.3, 0.7]]))
        tensor(1.0567)
    """
    logits = at_least_float32(student_logits)
    return F.cross_entropy(logits, targets.detach().to(logits.dtype))


class PSKD(Method):
    """Labels and the last epoch's predictions: ``(1 - a) CE + a * soft CE`` with ``a = alpha * (epoch + 1) / epochs``.

    An image that was not seen in the last epoch keeps its older prediction; one that never was has its label alone.
    """

    name = "pskd"
    needs = Requirements(teacher=False, index=True, labels=True, epoch=True)

    alpha: Share = option(
        default=0.8, doc="weight of the predictions in the last epoch (the paper's alpha, not that of method kd)"
    )

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        if training.labels is None:
            raise UsageError("pskd remembers the training set: it needs the labels of all its images; uskd does not")
        self.previous: Tensor  # [N, K], the predictions up to the last epoch; zeros: none
        self.current: Tensor  # [N, K], with those of this epoch
        for name in ("previous", "current"):
            self.register_buffer(name, torch.zeros(len(training.labels), training.classes))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        self.previous.copy_(self.current)

    @property
    def share(self) -> float:
        """Return the weight of the predictions in this epoch."""
        return self.alpha * (self.progress + 1) / (self.epochs or 1)

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"ce": (1 - self.share) * self.label_loss(student.logits, batch.targets)}

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if batch.index is None:
            raise UsageError(
                "pskd remembers every image by its sample id: pass index=, [B] positions in the training set"
            )
        if batch.soft_labels is not None:
            raise UsageError("pskd remembers predictions of single images: switch mixup and cutmix off")
        previous = self.previous[batch.index]
        unknown = (previous.sum(dim=1, keepdim=True) == 0).to(previous.dtype)
        previous = previous + unknown * pskd_targets(previous, batch.labels, share=0.0)
        if self.training:
            now = F.softmax(student.logits.detach(), dim=1)
            self.current.index_copy_(0, batch.index, now.to(self.current.dtype))
        return {"pskd": self.share * pskd_loss(student.logits, previous)}
