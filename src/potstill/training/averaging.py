"""Averaged weights and re-estimated BatchNorm statistics.

``ModelEma`` is an exponential moving average of a student's weights, with a warm-up of the decay.

AdaBN takes a network's BatchNorm statistics anew from images of another domain; its weights stay as they are.  Li,
Wang, Shi, Liu, Hou, "Revisiting Batch Normalization For Practical Domain Adaptation", 2016,
https://arxiv.org/abs/1603.04779
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from potstill.errors import UsageError
from potstill.evaluation.predictions import evaluation_mode
from potstill.types import Batch


def warmed_up_decay(decay: float, updates: int) -> float:
    """The decay after so many updates: ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow.

    Without it, the average over a training of fewer than about 1 / (1 - decay) steps is mostly its first weights.

    Example:
        >>> warmed_up_decay(0.9999, 0), round(warmed_up_decay(0.9999, 80), 6), warmed_up_decay(0.9999, 100_000)
        (0.1, 0.9, 0.9999)
    """
    return min(decay, (1 + updates) / (10 + updates))


class ModelEma(AveragedModel):
    """A copy of ``student`` whose parameters and BatchNorm statistics are averages; counters are copied.

    The first update copies all weights.  The number of updates is part of the state, so that a resumed training
    continues with the same decay.

    Args:
        student: the network to copy.
        decay: share of the average that an update keeps, once warmed up.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, multi_avg_fn=self._update_averages, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def _update_averages(self, averages: Any, current: Any, _: Any) -> None:
        if averages[0].is_floating_point():
            # `n_averaged` stays on the CPU, so reading it does not wait for the device.
            torch._foreach_lerp_(averages, current, 1 - warmed_up_decay(self.decay, int(self.n_averaged)))
        else:
            for ours, theirs in zip(averages, current, strict=True):
                ours.copy_(theirs)


def batch_norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """The layers that keep statistics of what they have seen."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


def check_batch_norm(network: nn.Module, name: str) -> None:
    """Networks without BatchNorm have nothing to adapt.

    Raises:
        UsageError: this one has none.
    """
    if not batch_norm_layers(network):
        raise UsageError(
            f"domain.adapt_batch_norm: {name} has no BatchNorm, so there are no statistics to adapt; leave it out"
        )


@torch.no_grad()
def adapt_batch_norm(network: nn.Module, batches: Iterable[Batch]) -> int:
    """Replace the mean and variance of every BatchNorm by those over all images, in place.

    One pass, in which every such layer normalises a batch by the batch's own statistics, as in training; all else
    (dropout) is in eval mode.  Of what each layer is given, mean and variance are summed up over all batches, so that
    the sizes of batches do not matter and the spread between them counts: for a first layer they are exactly those over
    all images.  Batches should be mixed: one of a single class would be normalised by what is special to it.

    Args:
        network: on the device of the batches, in float32.
        batches: images [B, 3, H, W] as the network wants them.

    Returns:
        How many images were seen.

    Raises:
        UsageError: a layer sees one value per channel, or no image came.
    """
    layers, seen = batch_norm_layers(network), 0
    sums = [_LayerSums() for _ in layers]
    with evaluation_mode(network), ExitStack() as hooks:
        before = [layer.momentum for layer in layers]
        for layer, own in zip(layers, sums, strict=True):
            hooks.callback(layer.register_forward_pre_hook(own.hook()).remove)
            layer.train()
            layer.momentum = 0.0  # the old statistics stay until the new ones are known
        try:
            for batch in batches:
                network(batch.images)
                seen += len(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError("domain.adapt_batch_norm needs batches of two images or more") from error
        finally:
            for layer, momentum in zip(layers, before, strict=True):
                layer.momentum = momentum
    for layer, own in zip(layers, sums, strict=True):
        own.put(layer)
    return seen


class _LayerSums:
    """Sums over everything that one layer is given, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def hook(self) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, given: tuple[Any, ...]) -> None:
            values: Tensor = given[0]
            channels = values.detach().to(torch.float64).transpose(0, 1).flatten(1)  # [C, B * H * W]
            if self.count == 0:
                self.shift = channels.mean(dim=1)  # keeps the squares small, so that nothing cancels
                self.total, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
            away = channels - self.shift[:, None]
            self.count += away.shape[1]
            self.total += away.sum(dim=1)
            self.squares += away.square().sum(dim=1)

        return add

    def put(self, layer: _BatchNorm) -> None:
        if self.count == 0:
            return  # a layer that the network has and does not use
        mean = self.total / self.count
        assert layer.running_mean is not None
        assert layer.running_var is not None
        # As torch keeps it: the unbiased one.
        variance = (self.squares - self.count * mean.square()) / max(1, self.count - 1)
        layer.running_mean.copy_(mean + self.shift)
        layer.running_var.copy_(variance.clamp(min=0))
