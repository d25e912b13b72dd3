"""KD++: pull embeddings towards the teacher's class means, and make them long.

Wang, Cheng, Duan, Wang, Feng and Kong, "Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
arXiv 2023.  https://arxiv.org/abs/2305.17007
As released: the larger of the two lengths carries gradient where it is the student's, epochs of the warm-up count from
0 (so that the first has no KD), and an embedding of another width passes BatchNorm, dropout and a linear layer.
Class means are computed in a pass over the training images before training.  On top of DKD or DIST in place of KD:
``kd_weight=0`` and combine.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TeacherPasses, TrainingInfo
from potstill.methods.kd import kd_loss
from potstill.methods.numerics import require_equal_shapes, require_two_images
from potstill.methods.requirements import Requirements
from potstill.options import Epochs, NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32


def nd_loss(student: Tensor, teacher: Tensor, labels: Tensor, class_means: Tensor) -> Tensor:
    r"""One minus the student's embedding along its class's mean, in units of the longer embedding.

    .. math:: \frac{1}{B} \sum_i \Big( 1 - \frac{f^s_i \cdot e_{y_i}}{\max(\lVert f^s_i \rVert, \lVert f^t_i \rVert)}
        \Big), \quad e_c = \frac{m_c}{\lVert m_c \rVert}

    Args:
        student: embeddings [B, D].
        teacher: embeddings [B, D].
        labels: [B], int64.
        class_means: [K, D], of any length.

    Returns:
        A scalar from 0 to 2.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0]])
        >>> nd_loss(student, teacher, torch.tensor([0]), torch.tensor([[2.0, 0.0]]))  # by hand: 1 - 3 / max(5, 10)
        tensor(0.7000)
    """
    require_equal_shapes(student, teacher, "nd: the embeddings")
    ours, theirs = at_least_float32(student), at_least_float32(teacher.detach())
    directions = F.normalize(class_means.to(ours.dtype), dim=1)[labels]
    longer = torch.maximum(torch.linalg.vector_norm(ours, dim=1), torch.linalg.vector_norm(theirs, dim=1))
    # Two embeddings of zeros have no direction, and no gradient.
    longer = longer.clamp(min=torch.finfo(longer.dtype).tiny)
    return (1 - (ours * directions).sum(dim=1) / longer).mean()


class ND(Method):
    """Labels, soft targets, and norm and direction of the embedding: ``CE + kd_weight * KD + weight * ND``."""

    name = "nd"
    weight: NonNegative = option(default=2.0, doc="weight of norm and direction")
    kd_weight: NonNegative = option(default=1.0, doc="weight of the soft targets once warm")
    temperature: Positive = option(default=4.0, doc="T of the soft targets")
    warmup_epochs: Epochs = option(
        default=20.0,
        of_epochs=240,
        doc="epochs within which the soft targets' weight rises from 0",
        fixed=True,
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100/resnet56-resnet20": {"kd_weight": 1.0, "weight": 2.0},
        "cifar100/resnet32x4-resnet8x4": {"kd_weight": 3.5, "weight": 2.0},
        "cifar100/wrn_40_2-wrn_40_1": {"kd_weight": 1.0, "weight": 1.5},
        "cifar100/resnet50-mobilenetv2": {"kd_weight": 3.0, "weight": 0.5},
        "cifar100/resnet32x4-shufflenetv1": {"kd_weight": 2.5, "weight": 1.5},
        "cifar100/resnet32x4-shufflenetv2": {"kd_weight": 4.0, "weight": 0.5},
    }

    def __post_init__(self) -> None:
        self.needs = Requirements(
            embedding=True, classes=True, epoch=True, prepare=True, labels=True, soft_targets=self.kd_weight > 0
        )
        self.translate: nn.Module = nn.Identity()
        self._means_known = False

    def warmup_length(self, epochs: int) -> float:
        length = super().warmup_length(epochs)
        return length and length + 1  # the weight begins at 0

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.outputs.embedding is not None
        assert teacher.outputs.embedding is not None
        inputs, outputs = student.outputs.embedding.shape[1], teacher.outputs.embedding.shape[1]
        if inputs != outputs:
            self.translate = nn.Sequential(nn.BatchNorm1d(inputs), nn.Dropout(0.5), nn.Linear(inputs, outputs))
        self.class_means: Tensor
        self.register_buffer("class_means", torch.zeros(training.classes, outputs))

    @torch.no_grad()
    def prepare(self, passes: TeacherPasses) -> None:
        sums = torch.zeros_like(self.class_means)
        counts = torch.zeros(len(sums), device=sums.device)
        for outputs, batch in passes():
            assert outputs.embedding is not None
            sums.index_add_(0, batch.labels, outputs.embedding.to(sums.dtype))
            counts += batch.labels.bincount(minlength=len(counts))
        if not sums.any():
            raise UsageError("nd points to the teacher's class means, and its embedding is 0 for every training image")
        self.class_means = sums / counts.clamp(min=1).unsqueeze(1)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.embedding is not None
        assert teacher.embedding is not None
        if not self._means_known:  # read once: it waits for the device
            if not self.class_means.any():
                raise UsageError("nd points to the teacher's class means: call distiller.prepare(batches) first")
            self._means_known = True
        if self.training and not isinstance(self.translate, nn.Identity):
            require_two_images(student.embedding, "nd")  # its BatchNorm
        translated = self.translate(student.embedding)
        terms = {"norm": self.weight * nd_loss(translated, teacher.embedding, batch.labels, self.class_means)}
        if self.kd_weight:
            length = self.in_epochs("warmup_epochs")
            warm = min(self.progress / length, 1.0) if length else 1.0
            soft = kd_loss(student.logits, teacher.logits, temperature=self.temperature)
            terms["kd"] = warm * self.kd_weight * soft
        return terms
