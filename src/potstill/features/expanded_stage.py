"""The network that NORM trains, with many channels behind the last stage, and its merged form for deployment."""

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.features.layout import Layout
from potstill.features.remodelled import Remodelled, facts_of
from potstill.features.taps import submodule
from potstill.precision import at_least_float32

LAYER_NORM_EPSILON = 1e-7  # of the logits, in NORM's release


class ExpandedStage(Remodelled):
    """The student with a linear block behind its last stage: 1x1 to many channels, 1x1 back, plus the map itself.

    Args:
        network: the student; its last stage is replaced in place.
        stage: path of the submodule that puts out the last feature map.
        channels: of that map.
        expanded: channels in the middle of the block.
        layout: how the submodule's output holds the map: "NCHW" or "NHWC".
        logit_scale: logits get mean 0 and variance 1 over the classes and are multiplied by this; 0: left as they are.

    Example:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> expanded = ExpandedStage(student, stage="0", channels=4, expanded=24).eval()
        >>> images = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(expanded(images), expanded.merged()(images), atol=1e-5)
        True
    """

    name = "expanded_stage"

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        channels: int,
        expanded: int,
        layout: Layout = "NCHW",
        logit_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.facts = facts_of(locals(), self.name)
        self.stage, self.logit_scale = stage, logit_scale
        self.network = network
        block = ExpandBlock(channels, expanded, layout)
        network.set_submodule(stage, nn.Sequential(submodule(network, stage), block))

    @property
    def tap(self) -> str:
        """Path of the submodule that puts out the expanded map [B, expanded, H, W]."""
        return f"network.{self.stage}.1.expand"

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]."""
        return _scaled(self.network(images), self.logit_scale)

    @torch.no_grad()
    def merged(self) -> "MergedStage":
        """The same function in eval mode with one 1x1 convolution in the block's place; this network stays as it is."""
        network = copy.deepcopy(self.network)
        old, block = cast(nn.Sequential, network.get_submodule(self.stage))
        weight, bias = cast(ExpandBlock, block).as_one()
        network.set_submodule(self.stage, old)
        given = {key: value for key, value in self.facts.items() if key not in ("name", "expanded")}
        merged = MergedStage(network, **given)
        conv = cast(PlaceWise, network.get_submodule(f"{self.stage}.1")).conv
        conv.to(weight.device)
        conv.weight.copy_(weight[:, :, None, None])
        assert conv.bias is not None
        conv.bias.copy_(bias)
        return merged.train(self.training)


class MergedStage(Remodelled):
    """The student with one 1x1 convolution behind its last stage.

    Args: as those of ``ExpandedStage``.
    """

    name = "merged_stage"

    def __init__(
        self, network: nn.Module, *, stage: str, channels: int, layout: Layout = "NCHW", logit_scale: float = 0.0
    ) -> None:
        super().__init__()
        self.facts = facts_of(locals(), self.name)
        self.logit_scale = logit_scale
        self.network = network
        place_wise = PlaceWise(nn.Conv2d(channels, channels, kernel_size=1), layout)
        network.set_submodule(stage, nn.Sequential(submodule(network, stage), place_wise))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]."""
        return _scaled(self.network(images), self.logit_scale)


class ExpandBlock(nn.Module):
    """BatchNorm(1x1 convolution) to many channels, the same back, and the input on top."""

    def __init__(self, channels: int, expanded: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.expand = nn.Sequential(nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded))
        self.back = nn.Sequential(nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels))
        for layer in (self.expand, self.back):
            nn.init.kaiming_normal_(cast(nn.Conv2d, layer[0]).weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Same shape and layout."""
        given = _first(features, self.layout)
        return _as_given(self.back(self.expand(given)) + given, self.layout)

    def as_one(self) -> tuple[Tensor, Tensor]:
        """Weight [C, C] and bias [C] of the one linear map that the block is in eval mode, in float64."""
        wide, wide_bias = _folded(self.expand)
        narrow, narrow_bias = _folded(self.back)
        unit = torch.eye(len(narrow), dtype=narrow.dtype, device=narrow.device)
        return narrow @ wide + unit, narrow @ wide_bias + narrow_bias


class PlaceWise(nn.Module):
    """A 1x1 convolution on a map of either layout."""

    def __init__(self, conv: nn.Conv2d, layout: Layout) -> None:
        super().__init__()
        self.conv, self.layout = conv, layout

    def forward(self, features: Tensor) -> Tensor:
        """Same shape and layout."""
        return _as_given(self.conv(_first(features, self.layout)), self.layout)


def _first(features: Tensor, layout: Layout) -> Tensor:
    return features.permute(0, 3, 1, 2) if layout == "NHWC" else features


def _as_given(features: Tensor, layout: Layout) -> Tensor:
    return features.permute(0, 2, 3, 1) if layout == "NHWC" else features


def layer_normed(logits: Tensor) -> Tensor:
    """Logits [B, K] of mean 0 and variance 1 over the classes of each image.

    Example:
        >>> layer_normed(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])
    """
    return F.layer_norm(at_least_float32(logits), logits.shape[1:], eps=LAYER_NORM_EPSILON)


def _scaled(logits: Tensor, scale: float) -> Tensor:
    return layer_normed(logits) * scale if scale else logits


def _folded(layer: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution and its BatchNorm in eval mode, in float64."""
    conv, norm = cast(nn.Conv2d, layer[0]), cast(nn.BatchNorm2d, layer[1])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - scale * norm.running_mean.double()
    return scale[:, None] * conv.weight.double()[:, :, 0, 0], bias
