"""ViTKD: match the tokens of shallow layers, and generate masked tokens of deep layers.

Yang, Li, Zeng, Li, Yuan and Li, "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation", 2022.
https://arxiv.org/abs/2209.02432
The authors join the first two blocks and the last one of two vision transformers.  Here those are the first two and the
last of the paired stages, whatever the networks: tokens are grids [B, D, h, w] like any feature map, and of two sizes
the larger grid is averaged down to the smaller.  A transformer is read at four depths unless layers are named, so name
its first, second and last block for the authors' form.  The published results add NKD: combine with ``nkd`` for that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features import pool_to_common_size
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.requirements import Requirements
from potstill.options import NonNegative, Share, option
from potstill.types import Batch, Outputs, at_least_float32


def vitkd_mimic_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Squared error of shallow tokens: summed over tokens and stages, averaged over the batch.

    .. math:: \sum_\text{stages} \frac{1}{B} \sum (F_s - F_t)^2

    Args:
        student_maps: each of [B, D, h, w], in the teacher's D.
        teacher_maps: of the same shapes.

    Returns:
        A scalar, at least 0; large, as it is a sum.

    Example:
        >>> vitkd_mimic_loss([torch.zeros(1, 2, 1, 1)], [torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)])  # 9 + 1
        tensor(10.)
    """
    terms = [
        (at_least_float32(ours) - at_least_float32(theirs.detach())).square().sum() / len(ours)
        for ours, theirs in zip(student_maps, teacher_maps, strict=True)
    ]
    return torch.stack(terms).sum()


def vitkd_generation_loss(generated: Tensor, teacher_map: Tensor, masked: Tensor) -> Tensor:
    r"""Squared error of the tokens that were masked: summed over them, averaged over the batch.

    .. math:: \frac{1}{B} \sum_{b,d,h,w} m_{bhw} (G - F_t)^2

    Args:
        generated: [B, D, h, w].
        teacher_map: of the same shape.
        masked: [B, 1, h, w], 1 where a token was masked, else 0.

    Example:
        >>> teacher = torch.tensor([[[[1.0, 2.0]]]])
        >>> vitkd_generation_loss(torch.zeros(1, 1, 1, 2), teacher, torch.tensor([[[[0.0, 1.0]]]]))  # 2^2
        tensor(4.)
    """
    difference = at_least_float32(generated) - at_least_float32(teacher_map.detach())
    return (masked * difference.square()).sum() / len(generated)


class TokenGenerator(nn.Module):
    """All tokens from those that were not masked; one learnt token stands in for the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Shapes [B, D, h, w] and [B, 1, h, w] -> [B, D, h, w]."""
        filled = torch.where(masked > 0, self.mask_token.to(tokens.dtype), tokens)
        generated: Tensor = self.conv2(torch.relu(self.conv1(filled)))
        return generated


class ViTKD(Method):
    """Labels, mimicked and generated tokens: ``CE + w_m * mimic + w_g / mask_share * generation``."""

    name = "vitkd"
    needs = Requirements(maps="pairs")

    mimic_weight: NonNegative = option(default=3e-5, doc="w_m, of the first two stages")
    generation_weight: NonNegative = option(default=3e-6, doc="w_g, of the last one")
    mask_share: Share = option(default=0.5, doc="share of its tokens; above 0")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        if self.mask_share == 0:
            raise UsageError("mask_share must be above 0: ViTKD generates the tokens that are masked")

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        ours, theirs = (_chosen(side.outputs.maps) for side in (student, teacher))
        self.aligns = nn.ModuleList(
            _align(own.shape[1], wanted.shape[1]) for own, wanted in zip(ours, theirs, strict=True)
        )
        self.generator = TokenGenerator(theirs[-1].shape[1])

    def draw(self, tokens: Tensor) -> Tensor:
        """Uniform numbers [B, h * w] for tokens [B, D, h, w]; those with the largest are masked."""
        return torch.rand(tokens.shape[0], tokens.shape[2] * tokens.shape[3], device=tokens.device)

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        aligned = [align(features) for align, features in zip(self.aligns, _chosen(student.maps), strict=True)]
        pairs = [pool_to_common_size(ours, theirs) for ours, theirs in zip(aligned, _chosen(teacher.maps), strict=True)]
        (tokens, wanted), shallow = pairs[-1], pairs[:-1]
        masked = self._mask(tokens)
        generation = vitkd_generation_loss(self.generator(tokens, masked), wanted, masked)
        terms = {"generation": self.generation_weight / self.mask_share * generation}
        if shallow:
            mimic = vitkd_mimic_loss([ours for ours, _ in shallow], [theirs for _, theirs in shallow])
            terms["mimic"] = self.mimic_weight * mimic
        return terms

    def _mask(self, tokens: Tensor) -> Tensor:
        """[B, 1, h, w], 1 for the tokens that are masked: as many in every image."""
        batch, _, height, width = tokens.shape
        ranks = self.draw(tokens).argsort(dim=1).argsort(dim=1)
        kept = int(height * width * (1 - self.mask_share))
        return (ranks >= kept).view(batch, 1, height, width).to(torch.float32)


def _chosen(maps: Sequence[Tensor]) -> list[Tensor]:
    """The first two maps and the last; the last alone where there are fewer than three."""
    return [maps[0], maps[1], maps[-1]] if len(maps) > 2 else [maps[-1]]


def _align(inputs: int, outputs: int) -> nn.Module:
    """To the teacher's channels; nothing where they are as many."""
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, kernel_size=1)
