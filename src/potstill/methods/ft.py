"""FT: match factors of the last map, from an encoder that is trained on the teacher's maps first.

Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.
https://arxiv.org/abs/1802.04977
Default is RepDistiller's form ("release"), from which the published CIFAR numbers come: it compares attention maps of
the factors.  ``form="paper"`` compares the whole factors, each divided by its length.  The paraphraser is trained on
the teacher's maps alone, before the student starts, and frozen then; RepDistiller does that with the student's
optimizer, here it has an Adam of its own.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.features import pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TeacherPasses, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32

SLOPE = 0.1  # of the leaky ReLUs, as released


@checked
def ft_loss(
    student_factor: Tensor,
    teacher_factor: Tensor,
    *,
    form: Literal["release", "paper"] = "release",
    power: Count = 2,
    exponent: Count = 1,
) -> Tensor:
    r"""Mean absolute difference of normalised factors.

    .. math:: \overline{\,\left| \frac{v_s}{\lVert v_s \rVert_2} - \frac{v_t}{\lVert v_t \rVert_2} \right|^q}, \qquad
        v_{hw} = \frac{1}{C} \sum_c f_{chw}^p

    In the paper's form v is the whole factor, all its channels and places in one vector.  Of two sizes, the larger
    factor is averaged down to the smaller.

    Args:
        student_factor: [B, C, H, W].
        teacher_factor: [B, C, H, W].
        form: "release" or "paper".
        power: p of the release's form.
        exponent: q.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[-3.0, -4.0]]]])
        >>> ft_loss(student, teacher, form="paper")  # (1, 0) and (-0.6, -0.8): (1.6 + 0.8) / 2
        tensor(1.2000)
        >>> ft_loss(student, teacher)  # (1, 0) and (9, 16) / sqrt(337)
        tensor(0.6907)
    """
    factors = pool_to_common_size(at_least_float32(student_factor), at_least_float32(teacher_factor.detach()))
    if form == "release":
        ours, theirs = (F.normalize(factor.pow(power).mean(dim=1).flatten(1), dim=1) for factor in factors)
    else:
        ours, theirs = (F.normalize(factor.flatten(1), dim=1) for factor in factors)
    return (ours - theirs).abs().pow(exponent).mean()


class Paraphraser(nn.Module):
    """Three 3 x 3 convolutions that squeeze the teacher's map into a factor of the same size."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, factor, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(factor, factor, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            features = F.leaky_relu(conv(features), SLOPE)
        return features


class Translator(nn.Module):
    """Three 3 x 3 convolutions with BatchNorm that turn the student's map into a factor of the same size."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, factor, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(factor)
        self.conv3 = nn.Conv2d(factor, factor, kernel_size=3, padding=1)
        self.norm3 = nn.BatchNorm2d(factor)

    def forward(self, features: Tensor) -> Tensor:
        layers = ((self.conv1, self.norm1), (self.conv2, self.norm2), (self.conv3, self.norm3))
        for conv, norm in layers:
            features = F.leaky_relu(norm(conv(features)), SLOPE)
        return features


class FT(Method):
    """Labels and factors of the last stage: ``CE + weight * FT``."""

    name = "ft"
    needs = Requirements(maps="last", prepare=True)

    weight: NonNegative = option(default=200.0, doc="weight of the factors; 200 in RepDistiller")
    form: Literal["release", "paper"] = option(default="release", doc='"release" or "paper", see ``ft_loss``')
    rate: Positive = option(default=0.5, doc="channels of the factor as a share of the teacher's", fixed=True)
    paraphraser_epochs: Count = option(
        default=30, doc="passes over the training images in which the paraphraser learns"
    )
    paraphraser_lr: Positive = option(default=1e-3, doc="its learning rate", fixed=True)
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        self.trained: Tensor
        self.register_buffer("trained", torch.tensor(False))

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = (side.outputs.maps[-1].shape[1] for side in (student, teacher))
        factor = max(1, int(theirs * self.rate))
        self.paraphraser = Paraphraser(theirs, factor).requires_grad_(False)
        self.translator = Translator(ours, factor)

    @torch.enable_grad()
    def prepare(self, passes: TeacherPasses) -> None:
        """Teach the paraphraser: its factor must suffice to restore the map.  Once only, also when a run is resumed."""
        if self.trained:
            return
        channels, factor = self.paraphraser.conv1.in_channels, self.paraphraser.conv3.out_channels
        # The restorer is as large as the paraphraser; it is not needed afterwards.
        restorer = nn.Sequential(
            nn.Conv2d(factor, factor, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(factor, channels, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels, channels, 3, padding=1),
        ).to(self.trained.device)
        both = nn.Sequential(self.paraphraser.requires_grad_(True), restorer)
        optimizer = torch.optim.Adam(both.parameters(), lr=self.paraphraser_lr)
        for _ in range(self.paraphraser_epochs):
            for teacher, _ in passes():
                features = at_least_float32(teacher.maps[-1].detach())
                optimizer.zero_grad()
                F.mse_loss(both(features), features).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.paraphraser.requires_grad_(False).zero_grad()
        self.trained.fill_(True)

    def train(self, mode: bool = True) -> "FT":
        """As ``nn.Module.train``, but the paraphraser, which has learnt, stays in eval mode like the teacher."""
        super().train(mode)
        if hasattr(self, "paraphraser"):
            self.paraphraser.eval()
        return self

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        theirs = self.paraphraser(teacher.maps[-1])
        return {"factors": self.weight * ft_loss(self.translator(student.maps[-1]), theirs, form=self.form)}
