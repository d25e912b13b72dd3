"""Fused optimizers on a CPU, for weights whose channels are last in memory.

Torch's fused CPU kernels work on plain memory: a channels-last weight, its gradient and its moments are copied there
and back at every step, which makes the step three times as long (AdamW on ResNet18: 18 ms in place of 6).  They treat
every number alone, so within a step such tensors may as well be shown as they lie in memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PlainMemory:
    """``PlainMemory(optimizer)``: from now on each step sees channels-last weights [O, I, H, W] as plain [O, H, W, I].

    Optimizers that are not fused are left as they are; so are weights on other devices.  Results are the same to the
    bit, and outside of a step nobody sees a difference.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.shown: list[tuple[Tensor, torch.Size, tuple[int, ...]]] = []  # weights as they were: shape and strides
        if optimizer.defaults.get("fused"):
            optimizer.register_step_pre_hook(self._show)
            optimizer.register_step_post_hook(self._put_back)

    @torch.no_grad()
    def _show(self, optimizer: Optimizer, *_: Any) -> None:
        for weight in _weights(optimizer):
            state, shape = optimizer.state.get(weight, {}), weight.shape
            assert weight.grad is not None
            # A gradient, or moments from a checkpoint, may lie otherwise.
            weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
            for key in _of_shape(state, shape):
                state[key] = state[key].contiguous(memory_format=torch.channels_last)
            self.shown.append((weight, shape, weight.stride()))
            plain = torch.Size((shape[0], *shape[2:], shape[1]))
            for tensor in (weight, weight.grad, *(state[key] for key in _of_shape(state, shape))):
                tensor.as_strided_(plain, _plain_strides(plain))

    @torch.no_grad()
    def _put_back(self, optimizer: Optimizer, *_: Any) -> None:
        for weight, shape, strides in self.shown:
            state, plain = optimizer.state.get(weight, {}), weight.shape
            for tensor in (weight, weight.grad, *(state[key] for key in _of_shape(state, plain))):
                if tensor is not None:
                    tensor.as_strided_(shape, strides)
        self.shown.clear()


def _weights(optimizer: Optimizer) -> list[Tensor]:
    """Those on a CPU that have a gradient and whose channels are last, where that is not plain memory anyway."""
    return [
        weight
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.grad is not None
        and weight.device.type == "cpu"
        and weight.ndim == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    ]


def _of_shape(state: dict[str, Any], shape: torch.Size) -> list[str]:
    """Moments: all but counters."""
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape]


def _plain_strides(shape: torch.Size) -> tuple[int, ...]:
    """Of contiguous memory.

    Example:
        >>> _plain_strides(torch.Size([4, 3, 2, 5]))
        (30, 10, 5, 1)
    """
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return tuple(strides)
