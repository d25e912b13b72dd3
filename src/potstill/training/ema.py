"""Exponential moving average of a student's weights, with a warm-up of the decay."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def warmed_up_decay(decay: float, updates: int) -> float:
    """The decay after so many updates: ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow.

    Without it, the average over a training of fewer than about 1 / (1 - decay) steps is mostly its first weights.

    Example:
        >>> warmed_up_decay(0.9999, 0), round(warmed_up_decay(0.9999, 80), 6), warmed_up_decay(0.9999, 100_000)
        (0.1, 0.9, 0.9999)
    """
    return min(decay, (1 + updates) / (10 + updates))


class WeightAverage(AveragedModel):
    """A copy of ``student`` whose parameters and BatchNorm statistics are averages; counters are copied.

    The first update copies all weights.  The number of updates is part of the state, so that a resumed training
    continues with the same decay.

    Args:
        student: the network to copy.
        decay: share of the average that an update keeps, once warmed up.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, multi_avg_fn=self._follow, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def _follow(self, averages: Any, current: Any, _: Any) -> None:
        if averages[0].is_floating_point():
            # `n_averaged` stays on the CPU, so reading it does not wait for the device.
            torch._foreach_lerp_(averages, current, 1 - warmed_up_decay(self.decay, int(self.n_averaged)))
        else:
            for ours, theirs in zip(averages, current, strict=True):
                ours.copy_(theirs)
