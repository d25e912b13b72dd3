"""Softmax regression representation learning: match logits of the teacher's classifier on the features of both.

Yang, Martinez, Bulat and Tzimiropoulos, "Knowledge Distillation via Softmax Regression Representation Learning",
ICLR 2021.  https://openreview.net/forum?id=ZzwDy_wiWv
Two forms are in use.  Default is that of SimKD's repository, where the published CIFAR-100 numbers come from: the
connector works on the pooled embedding, and KD (weight 1, T = 4) comes on top.  The form of cls_KD connects the last
map and pools afterwards, without KD: ``form="map", kd_weight=0, regression_weight=5`` (1 for ImageNet).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.kd import kd_loss
from potstill.methods.numerics import require_equal_shapes
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Positive, option
from potstill.types import Batch, Outputs, at_least_float32


def srrl_feature_loss(connected: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of the connected embedding and the teacher's.

    .. math:: \frac{1}{B D} \lVert h - f_t \rVert^2

    Args:
        connected: [B, D], the student's embedding behind the connector.
        teacher: [B, D].

    Example:
        >>> import torch
        >>> srrl_feature_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 1.0]]))  # (4 + 0) / 2
        tensor(2.)
    """
    require_equal_shapes(connected, teacher, "srrl: the embeddings")
    return F.mse_loss(at_least_float32(connected), at_least_float32(teacher.detach()))


def srrl_regression_loss(head_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean squared difference of the logits of the teacher's head on the student's features and on its own.

    .. math:: \frac{1}{B K} \lVert W_t h + b_t - z_t \rVert^2

    Args:
        head_logits: [B, K], the teacher's head, bias included, on the connected embedding.
        teacher_logits: [B, K].

    Example:
        >>> import torch
        >>> srrl_regression_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # (1 + 4) / 2
        tensor(2.5000)
    """
    require_equal_shapes(head_logits, teacher_logits, "srrl: the logits")
    return F.mse_loss(at_least_float32(head_logits), at_least_float32(teacher_logits.detach()))


class Connector(nn.Module):
    """1x1 convolution without bias, BatchNorm and ReLU to the teacher's channels; ``pool`` averages over a map."""

    def __init__(self, inputs: int, outputs: int, *, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        if pool:  # as released for that form only
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """[B, C] or [B, C, H, W] -> [B, D]."""
        maps = features if self.pool else features[:, :, None, None]
        connected: Tensor = F.relu(self.norm(self.conv(maps)))
        return connected.mean(dim=(2, 3))


class SRRL(Method):
    """Labels, KD, and the teacher's features and logits from the student's:
    ``CE + kd_weight * KD + feature_weight * MSE(h, f_t) + regression_weight * MSE(W_t h, z_t)``.
    """

    name = "srrl"

    form: Literal["pooled", "map"] = option(
        default="pooled", doc='"pooled", the connector works on the embedding; or "map", on the last map'
    )
    feature_weight: NonNegative = option(default=1.0, doc="weight of the embeddings' difference")
    regression_weight: NonNegative = option(default=1.0, doc="weight of the difference of the teacher's head's logits")
    kd_weight: NonNegative = option(default=1.0, doc="weight of the soft targets")
    temperature: Positive = option(default=4.0, doc="T of the soft targets")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        self.needs = Requirements(
            embedding=True, teacher_head=True, maps="last" if self.form == "map" else "none", several=True
        )

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert teacher.outputs.embedding is not None
        inputs = self._read(student.outputs).shape[1]
        self.connector = Connector(inputs, teacher.outputs.embedding.shape[1], pool=self.form == "map")

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert teacher.embedding is not None
        assert teacher.head is not None
        connected = self.connector(self._read(student))
        terms = {
            "feature": self.feature_weight * srrl_feature_loss(connected, teacher.embedding),
            "regression": self.regression_weight * srrl_regression_loss(teacher.head(connected), teacher.logits),
        }
        if self.kd_weight:
            terms["kd"] = self.kd_weight * kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        return terms

    def _read(self, student: Outputs) -> Tensor:
        if self.form == "map":
            return student.maps[-1]
        assert student.embedding is not None
        return student.embedding
