"""How much of a batch is worked on at once."""

from collections.abc import Iterator

from torch import Tensor

_TOGETHER = 2**18  # pixel values, so that intermediate results stay in the cache of a CPU's core


def slices(images: Tensor) -> Iterator[slice]:
    """Consecutive images of a batch [B, 3, H, W], a few at a time on a CPU, all together elsewhere."""
    step = max(1, _TOGETHER // images[0].numel()) if images.device.type == "cpu" else len(images)
    for first in range(0, len(images), step):
        yield slice(first, first + step)
