"""Layers that torch computes slowly on a CPU, in another form: the same sums and maxima.

Measured on two cores with AVX512-BF16, one thread, 128 images in bf16 and channels_last: a 1x1 convolution of 4096
channels on maps of one place (VGG's second fully connected layer in timm) takes 111 ms and as a matrix product 10 ms; a
2x2 maximum over 64 x 64 x 64 takes 39 ms and as two maxima of halves 8 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rewrite(network: nn.Module) -> None:
    """Let the layers of a frozen network compute in the faster form where there is one; nothing else changes."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_point(module):
            module.__class__ = _PointConv
        elif type(module) is nn.MaxPool2d and _halves(module):
            module.__class__ = _HalvingPool


class _PointConv(nn.Conv2d):
    """A 1x1 convolution that is a matrix product where the map has one place (squeeze-and-excitation, too)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.ndim == 4 and input.shape[-2:] == (1, 1):
            return F.linear(input.flatten(1), weight.flatten(1), bias)[..., None, None]
        found: Tensor = super()._conv_forward(input, weight, bias)
        return found


class _HalvingPool(nn.MaxPool2d):
    """The maximum of each two rows, then of each two columns."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 4 or input.shape[-2] % 2 or input.shape[-1] % 2:
            found: Tensor = super().forward(input)
            return found
        rows = torch.maximum(input[:, :, ::2], input[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _is_point(layer: nn.Conv2d) -> bool:
    plain = layer.stride == (1, 1) and layer.padding in ((0, 0), "valid")
    return plain and layer.kernel_size == (1, 1) and layer.groups == 1


def _halves(layer: nn.MaxPool2d) -> bool:
    twos = all(size in (2, (2, 2)) for size in (layer.kernel_size, layer.stride))
    plain = layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
    return twos and plain and not layer.ceil_mode and not layer.return_indices
