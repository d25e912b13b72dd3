"""Preprocessing as part of an exported network: resizing and normalising."""

import torch
from torch import Tensor, nn

from potstill.data.preprocessing import decoded_side, scale_and_shift
from potstill.input_spec import InputSpec

_FIXED_POINT_UNITS = 2**22  # of Pillow's resize


class Normalise(nn.Module):
    """Normalise uint8 [B, 3, S, S] to float32 of the same shape, as ``data.transforms`` does."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        scale, shift = scale_and_shift(spec.mean, spec.std)
        self.register_buffer("scale", torch.from_numpy(scale.copy())[None])
        self.register_buffer("shift", torch.from_numpy(shift.copy())[None])

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32) * self.scale - self.shift


class Resize(nn.Module):
    """Resize uint8 [B, H, W, 3] to uint8 [B, 3, S, S] as ``data.transforms`` does, by two matrix products.

    This is Pillow's antialiased bilinear resize: horizontally, rounded to bytes, then vertically.  All sums are
    multiples of 2**-22 and exact in float64, so their order does not matter.  Newer versions of Pillow begin with the
    vertical pass if that is cheaper (tall images): then up to a quarter of the pixels differ, by 1 of 255.
    """

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.side, self.size, self.mode = decoded_side(spec), spec.size, spec.resize_mode

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1], pixels.shape[2]
        if self.mode == "pad":
            longer = torch.sym_max(height, width)
            rows, columns = self._padded(height, longer), self._padded(width, longer)
        else:
            short = torch.sym_min(height, width)
            rows = self._weights(height, short if self.mode == "crop" else height)
            columns = self._weights(width, short if self.mode == "crop" else width)
        across = torch.floor(pixels.permute(0, 3, 1, 2).to(torch.float64) @ columns.T + 0.5)
        return torch.floor(rows @ across + 0.5).to(torch.uint8)

    def _weights(self, whole: int | torch.SymInt, length: int | torch.SymInt) -> Tensor:
        """Return the weights [S, whole] of the source pixels, for a centred crop of ``length`` of them."""
        scale = torch.scalar_tensor(1.0, dtype=torch.float64).mul(length).div(self.side)
        first = (self.side - self.size) // 2
        targets = torch.arange(first, first + self.size, dtype=torch.float64) + 0.5
        return _bilinear(targets * scale + (whole - length) / 2, scale, whole)

    def _padded(self, whole: int | torch.SymInt, longer: int | torch.SymInt) -> Tensor:
        """Return the weights [S, whole] with padding to the longer side; those of the border are 0."""
        one = torch.scalar_tensor(1.0, dtype=torch.float64)
        exact = one.mul(whole).mul(self.side).div(one.mul(longer))
        filled = torch.floor(exact + 0.5).clamp(min=1.0)
        before = torch.floor((self.side - filled) / 2)
        place = torch.arange(self.side, dtype=torch.float64) - before
        inside = ((place >= 0) & (place < filled))[:, None]
        scale = one.mul(whole).div(filled)
        middle = (place.clamp(min=0.0).minimum(filled - 1) + 0.5) * scale
        return _bilinear(middle, scale, whole) * inside


def _bilinear(middle: Tensor, scale: Tensor, whole: int | torch.SymInt) -> Tensor:
    """Return Pillow's weights [S, whole] around S centres; a target pixel covers ``scale`` source pixels."""
    middle, support = middle[:, None], scale.clamp(min=1.0)
    pixel = torch.arange(whole, dtype=torch.float64)
    near = (pixel >= torch.floor(middle - support + 0.5)) & (pixel < torch.floor(middle + support + 0.5))
    weights = (1 - ((pixel + 0.5 - middle) / support).abs()).clamp(min=0) * near
    return torch.floor(weights / weights.sum(1, keepdim=True) * _FIXED_POINT_UNITS + 0.5) / _FIXED_POINT_UNITS


def create_preprocessing(spec: InputSpec, inside: str) -> nn.Sequential:
    """Return the modules before the network; empty for "none"."""
    steps: list[nn.Module] = [Resize(spec)] if inside == "resize" else []
    return nn.Sequential(*steps, *([] if inside == "none" else [Normalise(spec)]))


def example_input(spec: InputSpec, inside: str) -> Tensor:
    """Return two black images as input of the exported model."""
    if inside == "resize":
        return torch.zeros(2, spec.size + 9, spec.size + 5, 3, dtype=torch.uint8)
    kind = torch.float32 if inside == "none" else torch.uint8
    return torch.zeros(2, 3, spec.size, spec.size, dtype=kind)


def dynamic_axes(inside: str) -> dict[int, torch.export.Dim]:
    """Return the axes of the input with variable length."""
    names = {0: "batch", 1: "height", 2: "width"} if inside == "resize" else {0: "batch"}
    return {axis: torch.export.Dim(name) for axis, name in names.items()}
