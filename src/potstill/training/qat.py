"""Quantization-aware training: the forward pass rounds weights and inputs to int8.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZED_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_MIN_SCALE = 1e-12  # for a channel or an image that is all zeros


@contextmanager
def simulated_int8(network: nn.Module) -> Iterator[None]:
    """Within the block, round weights and inputs of convolutions and linear layers as int8 does.

    Weights are rounded to 255 levels, symmetric about 0, with a scale per output channel; inputs to 256 levels between
    the batch's minimum and maximum, including 0, as in ``potstill export --int8``, which takes the range over its
    calibration images.  A BatchNorm after a layer does not matter: folded into the layer, it multiplies each channel's
    scale.  Gradients pass the rounding unchanged and are 0 outside of the range.  There is no state between batches.

    Args:
        network: any; parameters, buffers and state dict are unchanged.

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
    """Return the number of epochs before quantization-aware training begins.

    Example:
        >>> plain_epochs(10, 0.0), plain_epochs(10, 0.25), plain_epochs(10, 1.0)
        (10, 7, 0)
    """
    return epochs - ceil(round(epochs * qat_fraction, 9))


def _quantize_hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # An instance attribute shadows the parameter of that name, which stays in place.
    vars(layer)["weight"] = fake_quantize_weight(layer._parameters["weight"])  # type: ignore[arg-type]
    return (fake_quantize_input(inputs[0]), *inputs[1:])


def _restore_hook(layer: nn.Module, inputs: Any, output: Any) -> None:
    vars(layer).pop("weight", None)


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Round weights [C, ...] to the int8 grid, -127 to 127, with a scale per output channel."""
    scale = (weight.detach().float().abs().flatten(1).amax(1) / 127).clamp(min=_MIN_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127).to(weight.dtype)


def fake_quantize_input(values: Tensor) -> Tensor:
    """Round values to the int8 grid, -128 to 127, between their minimum and maximum, including 0."""
    detached = values.detach().float()
    low, high = detached.amin().clamp(max=0), detached.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=_MIN_SCALE)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, -128, 127).to(values.dtype)
