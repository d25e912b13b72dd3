"""Quantization-aware training: weights and inputs are rounded to int8 in the forward pass.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZED_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_MIN_SCALE = 1e-12  # a scale; of a channel, or an image, that is all zeros


@contextmanager
def simulated_int8(network: nn.Module) -> Iterator[None]:
    """Within the block, convolutions and linear layers see their weights and inputs as int8 would have them.

    Weights are rounded to 255 steps, symmetric about 0, with a scale for each output channel; inputs to 256 steps
    between the least and the largest value of the batch, with 0 among them: as `potstill export --int8` does it, which
    takes the range of inputs over its calibration images.  BatchNorm after a layer changes nothing in this: folded into
    the layer, it multiplies each channel's scale.  Gradients pass the rounding as if it were not there, and stop at
    what lies outside of the range.  Nothing is kept from batch to batch, so a training that goes on needs no more.

    Args:
        network: any; parameters, buffers and state dict stay as they are.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.27, 0.004]]))
        >>> with simulated_int8(layer):
        ...     rounded = layer(torch.tensor([[0.0, 255.0]]))
        >>> round(rounded.item(), 4), round(layer(torch.tensor([[0.0, 255.0]])).item(), 4)
        (0.0, 1.02)
    """
    layers = [each for each in network.modules() if isinstance(each, QUANTIZED_LAYERS)]
    hooks = [each.register_forward_pre_hook(_quantize_hook) for each in layers]
    hooks += [each.register_forward_hook(_restore_hook, always_call=True) for each in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plain_epochs(epochs: int, qat_fraction: float) -> int:
    """How many epochs come before the simulation begins.

    Example:
        >>> plain_epochs(10, 0.0), plain_epochs(10, 0.25), plain_epochs(10, 1.0)
        (10, 7, 0)
    """
    return epochs - ceil(round(epochs * qat_fraction, 9))


def _quantize_hook(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    # An attribute of the instance is found before the parameter of that name, which stays where it is.
    vars(layer)["weight"] = fake_quantize_weight(layer._parameters["weight"])  # type: ignore[arg-type]
    return (fake_quantize_input(given[0]), *given[1:])


def _restore_hook(layer: nn.Module, given: Any, answer: Any) -> None:
    vars(layer).pop("weight", None)


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """[C, ...] weights on the grid of int8, -127 to 127, each output channel with its own scale."""
    found = weight.detach().float()
    scale = (found.abs().flatten(1).amax(1) / 127).clamp(min=_MIN_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127).to(weight.dtype)


def fake_quantize_input(values: Tensor) -> Tensor:
    """Values on the grid of int8, -128 to 127, between the least and the largest of them all, and 0."""
    found = values.detach().float()
    low, high = found.amin().clamp(max=0), found.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=_MIN_SCALE)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, -128, 127).to(values.dtype)
