"""From decoded pixels to what a network sees: fit to a square, cut the centre, normalise."""

from functools import lru_cache

import torch
from torch import Tensor

from potstill.data.decode import Pixels
from potstill.data.square import CROP_SHARE as CROP_SHARE
from potstill.data.square import fit as fit
from potstill.data.square import packed_side as packed_side
from potstill.inputs import InputSpec, Triple


def prepare(pixels: Pixels, spec: InputSpec) -> Tensor:
    """One decoded image as the network wants it: what prediction uses, and bit for bit what a Loader without
    augmentation gives.

    Args:
        pixels: uint8 [H, W, 3].
        spec: size, resize mode and normalisation.

    Returns:
        float32 [3, size, size].
    """
    side = packed_side(spec)
    square = torch.from_numpy(fit(pixels, side, spec.resize_mode))
    return normalise(centre(square[None], spec.size), spec)[0]


def centre(images: Tensor, size: int) -> Tensor:
    """The centred square: [B, 3, R, R] -> [B, 3, size, size]."""
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 of the same shape, contiguous: (x / 255 - mean) / std."""
    scale, shift = _scale_and_shift(spec.mean, spec.std, images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift)


@lru_cache(maxsize=16)  # a batch need not wait for six numbers to reach the device
@torch.inference_mode(False)
def _scale_and_shift(mean: Triple, std: Triple, device: torch.device) -> tuple[Tensor, Tensor]:
    means, deviations = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (mean, std))
    return (1 / (255 * deviations)).float().to(device), (means / deviations).float().to(device)
