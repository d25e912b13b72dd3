"""From decoded pixels to what a network sees: fit to a square, cut the centre, normalise."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from potstill.data.decode import Pixels
from potstill.inputs import InputSpec, Triple

CROP_SHARE = 0.875  # side of the square that random resized crops are drawn from is size / CROP_SHARE


def prepare(pixels: Pixels, spec: InputSpec) -> Tensor:
    """One decoded image as the network wants it: what prediction uses, and bit for bit what a Loader without
    augmentation gives.

    Args:
        pixels: uint8 [H, W, 3].
        spec: size, fit and normalisation.

    Returns:
        float32 [3, size, size].
    """
    side = packed_side(spec)
    square = torch.from_numpy(fit(pixels, side, spec.fit))
    return normalise(centre(square[None], spec.size), spec)[0]


def packed_side(spec: InputSpec, *, random_crops: bool = False) -> int:
    """Side in pixels of the square that images are kept as before views are cut from it."""
    if random_crops:
        return round(spec.size / CROP_SHARE)
    return round(spec.size / spec.crop_share) if spec.fit == "crop" else spec.size


def fit(pixels: Pixels, side: int, how: str) -> Pixels:
    """Resize to a square, bilinear with antialiasing.

    Args:
        pixels: uint8 [H, W, 3].
        side: of the square, in pixels.
        how: "crop": the largest centred square of the image; "squash": the whole image.

    Returns:
        uint8 [3, side, side]: channels first, so that normalising a batch needs no transposition.
    """
    height, width = pixels.shape[:2]
    if (height, width) != (side, side):
        short = min(height, width)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short) if how == "crop" else (0, 0, width, height)
        pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box=box))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


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
