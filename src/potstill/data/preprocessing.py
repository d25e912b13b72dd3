"""Preprocess one decoded image with numpy alone: resize to a square, centre crop, normalise.

``transforms`` does the same with batches of tensors, with identical results.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.data.image_io import Pixels
from potstill.input_spec import InputSpec, Triple

_NEGLIGIBLE = 0.02  # share of an image below which a crop is not reported
CROP_SHARE = 0.875  # random resized crops are drawn from a square of side size / CROP_SHARE

Floats = NDArray[np.float32]


def decoded_side(spec: InputSpec, *, random_crops: bool = False) -> int:
    """Return the side, in pixels, of the square that images are decoded to, before views are cropped from it."""
    if random_crops:
        return round(spec.size / CROP_SHARE)
    return round(spec.size / spec.crop_share) if spec.resize_mode == "crop" else spec.size


def decoded_square(spec: InputSpec, *, random_crops: bool = False) -> tuple[int, str]:
    """Return side and resize mode of the squares that images are decoded to: random crops are cut from whole images."""
    whole = random_crops and spec.resize_mode == "crop"
    return decoded_side(spec, random_crops=random_crops), "whole" if whole else spec.resize_mode


def resize_to_square(image: Pixels | Image.Image, side: int, resize_mode: str) -> Pixels:
    """Resize to a square, bilinear with antialiasing.

    Args:
        image: uint8 [H, W, 3], or an RGB image of Pillow.
        side: of the square, in pixels.
        resize_mode: "crop": the largest centred square; "pad": the whole image, centred between black borders, the
            default fill of torchvision's ``Pad`` and Keras's ``pad_to_aspect_ratio``; "stretch": the whole image, in
            another aspect ratio.

    Returns:
        uint8 [3, side, side]: channels first, so that normalising a batch needs no transposition.
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if (height, width) != (side, side):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if resize_mode == "pad" and height != width:
            return _pad_to_square(image, side)
        short = min(height, width)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short) if resize_mode == "crop" else (0, 0, width, height)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return to_planes(image) if isinstance(image, Image.Image) else np.ascontiguousarray(image.transpose(2, 0, 1))


def to_planes(image: Image.Image, out: Pixels | None = None) -> Pixels:
    """Return an RGB image of Pillow as uint8 [3, H, W]; Pillow separates the channels faster than numpy.

    Args:
        image: of H x W pixels.
        out: receives the planes, uint8 [3, H, W] or more rows; None: a new array.
    """
    shape = image.height, image.width
    planes = np.empty((3, *shape), np.uint8) if out is None else out
    for plane, channel in zip(planes, "RGB", strict=True):
        plane[: image.height] = np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(shape)
    return planes


def square_shape(side: int, resize_mode: str) -> tuple[int, int, int]:
    """Return the shape of a decoded square: [3, side, side]; with "whole" one row more, see ``stretch_with_shape``."""
    return 3, side + (resize_mode == "whole"), side


def stretch_with_shape(image: Pixels | Image.Image, side: int, shape: tuple[int, ...]) -> Pixels:
    """Return the whole image as a square, for crops that keep the shape (height, width) of what they show.

    uint8 [3, side + 1, side]: the square as by "stretch", and a row that begins with ``shape``, so that both are cached
    together; ``aspect_ratios`` reads it.  ``side`` is at least 8.
    """
    square = np.empty(square_shape(side, "whole"), np.uint8)
    square[:, side] = 0
    if isinstance(image, Image.Image):
        whole = image.size == (side, side)
        to_planes(image if whole else image.resize((side, side), Image.Resampling.BILINEAR), square)
    else:
        square[:, :side] = resize_to_square(image, side, "stretch")
    square[0, side, :8] = np.array(shape, "<u4").view(np.uint8)
    return square


def aspect_ratios(squares: Pixels) -> NDArray[np.float64]:
    """Return width / height of the images of squares by ``stretch_with_shape``, [B]."""
    height, width = np.ascontiguousarray(squares[:, 0, -1, :8]).view("<u4").astype(np.float64).T
    ratios: NDArray[np.float64] = width / height
    return ratios


def _pad_to_square(image: Image.Image, side: int) -> Pixels:
    height, width = padded_shape(image.height, image.width, side)
    small = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((3, side, side), dtype=np.uint8)
    square[:, top : top + height, left : left + width] = small.transpose(2, 0, 1)
    return square


def padded_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """Return height and width of an image within its padded square, whose side is the longer one.

    >>> padded_shape(100, 200, 32)
    (16, 32)
    """
    longer = max(height, width)
    return max(1, (2 * height * side + longer) // (2 * longer)), max(1, (2 * width * side + longer) // (2 * longer))


def crop_notes(widths: NDArray[Any], heights: NDArray[Any], resize_mode: str) -> list[str]:
    """Return a sentence on what the median image loses by ``resize_mode``; none if all are square, or unknown.

    Example:
        >>> crop_notes(np.array([400, 400, 100]), np.array([300, 300, 100]), "crop")
        ['the centre crop cuts off 25 % of the median image; data.resize_mode: pad keeps all of it']
    """
    known = np.minimum(widths, heights) > 0
    shorter, longer = (pick(widths[known], heights[known]).astype(float) for pick in (np.minimum, np.maximum))
    if not len(longer) or (shorter == longer).all():
        return []
    ratios = shorter / longer
    typical = float(np.median(ratios))
    if typical > 1 - _NEGLIGIBLE:  # most are square: report the others
        odd = ratios[ratios <= 1 - _NEGLIGIBLE]
        if resize_mode != "crop" or not len(odd):
            return []
        share = f"{100 * (1 - float(np.median(odd))):.0f} % of the median one of {len(odd):,} images"
        return [f"the centre crop cuts off {share} that are not square; data.resize_mode: pad keeps all of them"]
    lost = f"{100 * (1 - typical):.0f} %"
    return [
        {
            "crop": f"the centre crop cuts off {lost} of the median image; data.resize_mode: pad keeps all of it",
            "pad": f"{lost} of the median image's square is black border",
            "stretch": f"the median image is stretched by {1 / typical:.2f}; data.resize_mode: pad keeps aspect ratios",
        }[resize_mode]
    ]


def crop_to_input(pixels: Pixels, spec: InputSpec) -> Pixels:
    """Return the network's input before normalisation: uint8 [H, W, 3] -> uint8 [3, size, size]."""
    square = resize_to_square(pixels, decoded_side(spec), spec.resize_mode)
    start = (square.shape[-1] - spec.size) // 2
    return np.ascontiguousarray(square[:, start : start + spec.size, start : start + spec.size])


def normalize_array(images: Pixels, spec: InputSpec) -> Floats:
    """Return (x / 255 - mean) / std: uint8 [..., 3, S, S] -> float32 of the same shape."""
    scale, shift = scale_and_shift(spec.mean, spec.std)
    return images.astype(np.float32) * scale - shift


@lru_cache(maxsize=16)
def scale_and_shift(mean: Triple, std: Triple) -> tuple[Floats, Floats]:
    """Return scale and shift, float32 [3, 1, 1]: a normalised image is pixels (0 to 255) * scale - shift."""
    means, deviations = (np.array(each, dtype=np.float64).reshape(3, 1, 1) for each in (mean, std))
    factors: Any = (1 / (255 * deviations)).astype(np.float32), (means / deviations).astype(np.float32)
    return factors[0], factors[1]
