"""Averaged weights (``ModelEma``) and BatchNorm statistics re-estimated on another domain (AdaBN).

AdaBN: Li, Wang, Shi, Liu, Hou, "Revisiting Batch Normalization For Practical Domain Adaptation", 2016,
https://arxiv.org/abs/1603.04779
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from potstill.errors import UsageError
from potstill.evaluation.predictions import evaluation_mode
from potstill.types import Batch, widest_float


def warmed_up_decay(decay: float, updates: int) -> float:
    """Return the decay after n updates, ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow.

    Without warm-up, the average over fewer than about 1 / (1 - decay) steps is mostly the initial weights.

    Example:
        >>> warmed_up_decay(0.9999, 0), round(warmed_up_decay(0.9999, 80), 6), warmed_up_decay(0.9999, 100_000)
        (0.1, 0.9, 0.9999)
    """
    return min(decay, (1 + updates) / (10 + updates))


class ModelEma(AveragedModel):
    """Exponential moving average of a student's parameters and BatchNorm statistics; counters are copied.

    The first update copies all weights.  The number of updates is in the state dict, so a resumed training continues.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, use_buffers=True)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Add the current weights; torch's own copies the number of updates to the device twice, which waits for it."""
        updates = self.updates
        pairs = zip(_tensors(self.module), _tensors(model), strict=True)
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, value in pairs:
            if updates and average.is_floating_point():
                averages, values = averaged.setdefault(average.dtype, ([], []))
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        for averages, values in averaged.values():
            torch._foreach_lerp_(averages, values, 1 - warmed_up_decay(self.decay, updates))
        self.updates += 1
        self.n_averaged.fill_(self.updates)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load averages and number of updates."""
        outcome = super().load_state_dict(*args, **kwargs)
        self.updates = int(self.n_averaged)
        return outcome


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return (each.detach() for each in (*network.parameters(), *network.buffers()))


def batch_norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers with running statistics."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


def check_batch_norm(network: nn.Module, name: str) -> None:
    """Raise UsageError if the network has no BatchNorm to adapt."""
    if not batch_norm_layers(network):
        raise UsageError(
            f"domain.adapt_batch_norm: {name} has no BatchNorm, so there are no statistics to adapt; leave it out"
        )


@torch.no_grad()
def adapt_batch_norm(network: nn.Module, batches: Iterable[Batch]) -> int:
    """Replace the running mean and variance of every BatchNorm by those over all images, in place.

    In one pass, BatchNorm layers normalise each batch by its own statistics, as in training; everything else (dropout)
    is in eval mode.  Mean and variance of a layer's inputs are accumulated over all batches, so batch sizes do not
    matter and the variance between batches counts; for a first layer they are exactly those over all images.  Batches
    should mix classes: a batch of one class would be normalised by what is special to it.

    Return the number of images [B, 3, H, W], normalised for the network; UsageError: a layer gets one value per
    channel.
    """
    layers, count = batch_norm_layers(network), 0
    sums = [_LayerSums() for _ in layers]
    with evaluation_mode(network), ExitStack() as hooks:
        momenta = [layer.momentum for layer in layers]
        for layer, layer_sums in zip(layers, sums, strict=True):
            hooks.callback(layer.register_forward_pre_hook(layer_sums.update).remove)
            layer.train()
            layer.momentum = 0.0  # keep the old statistics until the new ones are known
        try:
            for batch in batches:
                network(batch.images)
                count += len(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError("domain.adapt_batch_norm needs batches of two images or more") from error
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    for layer, layer_sums in zip(layers, sums, strict=True):
        layer_sums.copy_to(layer)
    return count


class _LayerSums:
    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def update(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        values: Tensor = inputs[0]
        channels = values.detach().to(widest_float(values.device)).transpose(0, 1).flatten(1)  # [C, B * H * W]
        if self.count == 0:
            self.shift = channels.mean(dim=1)  # keeps the squares small, so that nothing cancels
            self.total, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        centered = channels - self.shift[:, None]
        self.count += centered.shape[1]
        self.total += centered.sum(dim=1)
        self.squares += centered.square().sum(dim=1)

    def copy_to(self, layer: _BatchNorm) -> None:
        if self.count == 0:
            return  # a layer that the forward pass does not use
        mean = self.total / self.count
        assert layer.running_mean is not None
        assert layer.running_var is not None
        variance = (self.squares - self.count * mean.square()) / max(1, self.count - 1)  # unbiased, as in torch
        layer.running_mean.copy_(mean + self.shift)
        layer.running_var.copy_(variance.clamp(min=0))
