"""Brightness, contrast and saturation of a whole batch, by torchvision's formulas.

Torchvision applies them to one image at a time.  Here each of three rounds does to every image what comes next for it;
all three are ``factor * pixels + something``.  Factors are multiples of 2**-10, and greys are worked out in whole
numbers, so that next to nothing is rounded: views are the same on every device.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.chunks import slices
from potstill.data.draws import Draws

_STEPS = 2**10
_CONTRAST, _SATURATION = 1, 2  # 0: brightness
_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def jitter(images: Tensor, strength: float, draws: Draws) -> Tensor:
    """Brightness, contrast and saturation, in an order of its own for each image.

    Args:
        images: uint8 [B, 3, S, S].
        strength: s; the factors are uniform in [1 - s, 1 + s].
        draws: of these samples.

    Returns:
        The same shape and type.
    """
    drawn = np.stack([draws(f"jitter {what}") for what in ("brightness", "contrast", "saturation")], axis=1)
    factors = np.rint((1 - strength + 2 * strength * drawn) * _STEPS) / _STEPS
    orders = _ORDERS[(draws("jitter order") * len(_ORDERS)).astype(np.int64)]
    return adjusted(images, np.take_along_axis(factors, orders, axis=1), orders)


def adjusted(images: Tensor, factors: NDArray[np.float64], orders: NDArray[np.int64]) -> Tensor:
    """Images changed in rounds; what is left of one round are whole numbers.

    Args:
        images: uint8 [B, 3, S, S].
        factors: [B, rounds], multiples of 2**-10 of at least 0.
        orders: [B, rounds]: 0 brightness, 1 contrast, 2 saturation.
    """
    rounds = torch.from_numpy(np.stack([factors, orders]).astype(np.float32)).to(images.device, non_blocking=True)
    changed = torch.empty_like(images, memory_format=torch.contiguous_format)
    for chosen in slices(images):
        some = images[chosen].to(torch.float32, memory_format=torch.contiguous_format)
        for factor, what in rounds[:, chosen, :, None, None, None].unbind(2):
            _change(some, factor, what)
        changed[chosen] = some.to(torch.int16)  # from which bytes are made faster
    return changed


def _change(images: Tensor, factor: Tensor, what: Tensor) -> None:
    """One round, in place; ``factor`` and ``what`` are [B, 1, 1, 1]."""
    grey, rest = _grey(images), 1 - factor
    lines = grey.sum(dim=3, keepdim=True)  # whole numbers: exact in any order, as are doubles of them
    total = lines.sum(dim=2, keepdim=True, dtype=torch.float64)
    mean = total / torch.full_like(total, grey[0].numel())  # by a plain number, some devices round otherwise
    towards = torch.where(what == _CONTRAST, rest * mean, 0).float()
    grey.mul_(torch.where(what == _SATURATION, rest, 0)).add_(towards)
    images.mul_(factor).add_(grey).clamp_(0, 255).floor_()


def _grey(images: Tensor) -> Tensor:
    """[B, 1, S, S]: 0.2989 R + 0.587 G + 0.114 B, rounded down."""
    red, green, blue = images.unbind(1)
    weighted = torch.mul(red, 2989).add_(green, alpha=5870).add_(blue, alpha=1140)
    # Half a unit away from where rounding down would depend on the last bit.
    return weighted.add_(0.5).mul_(1e-4).floor_()[:, None]
