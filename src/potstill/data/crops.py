"""Random resized crops of a whole batch: boxes drawn together, resized by two matrix products."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.draws import uniform

Boxes = NDArray[np.int64]

_ATTEMPTS = 10
_UNITS = 2**11
_LOG_RATIO = (np.log(3 / 4), np.log(4 / 3))


def draw_boxes(
    scale: tuple[float, float], side: int, seed: int, ids: NDArray[np.int64], view: NDArray[np.int64] | int
) -> Boxes:
    """Boxes (top, left, height, width) in a square, int64 [B, 4].

    As torchvision's ``RandomResizedCrop``: the area is uniform in ``scale`` (shares of the square), the logarithm of
    width / height is uniform between those of 3/4 and 4/3; ten attempts to fit, then the whole square.
    """
    boxes = np.tile(np.array([0, 0, side, side], dtype=np.int64), (len(ids), 1))
    missing = np.ones(len(ids), dtype=np.bool_)
    for attempt in range(_ATTEMPTS):

        def draw(field: str, attempt: int = attempt) -> NDArray[np.float64]:
            return uniform(seed, f"crop {field} {attempt}", ids, view)

        area = side * side * (scale[0] + (scale[1] - scale[0]) * draw("area"))
        ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * draw("ratio"))
        width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = missing & (width > 0) & (width <= side) & (height > 0) & (height <= side)
        top = (draw("top") * (side - height + 1)).astype(np.int64)
        left = (draw("left") * (side - width + 1)).astype(np.int64)
        boxes[fits] = np.stack([top, left, height, width], axis=1)[fits]
        missing &= ~fits
        if not missing.any():
            break
    return boxes


def resized_crops(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Crop each image to its box and resize that, bilinear with antialiasing.

    Args:
        images: uint8 [B, 3, R, R].
        boxes: (top, left, height, width), int64 [B, 4].
        size: S.

    Returns:
        uint8 [B, 3, S, S], within 1 of ``torchvision.transforms.v2.functional.resized_crop``.
    """
    batch, channels, side, _ = images.shape
    device = images.device
    rows = torch.from_numpy(_weights(boxes[:, 0], boxes[:, 2], side, size)).to(device)  # [B, S, R]
    columns = torch.from_numpy(_weights(boxes[:, 1], boxes[:, 3], side, size)).to(device)
    # Bilinear resizing is separable: one matrix for the rows, one for the columns of each image.  All sums are exact
    # in float32 (8 + 11 bits, rounded to 12; 12 + 11 bits), so that a view depends neither on the order of summation
    # nor, with it, on batch size, threads or the matrix library.
    across = torch.bmm(images.reshape(batch, channels * side, side).float(), columns.transpose(1, 2))
    across = across.mul_(16).round_().div_(16).view(batch, channels, side, size)
    resized = torch.stack([torch.bmm(rows, across[:, channel]) for channel in range(channels)], dim=1)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _weights(start: NDArray[np.int64], length: NDArray[np.int64], side: int, size: int) -> NDArray[np.float32]:
    """[B, size, side]: how much each pixel of the side adds to each pixel of the view, in one direction.

    A triangle as wide as two source pixels, or two target pixels where the image shrinks (antialiasing), cut at the
    box and normalised.  Multiples of 2**-11 that add up to 1 exactly.
    """
    scale = (length / size).astype(np.float32)[:, None, None]
    support = np.maximum(scale, 1.0)
    # centres of the view's pixels, in pixels of the box
    target = (np.arange(size, dtype=np.float32)[None, :, None] + 0.5) * scale
    source = np.arange(side, dtype=np.float32) - start.astype(np.float32)[:, None, None]
    weights = np.maximum(0.0, 1.0 - np.abs(source + 0.5 - target) / support)
    weights *= (source >= 0) & (source < length[:, None, None])
    units = np.rint(weights / weights.sum(axis=2, keepdims=True) * _UNITS)
    largest = units.argmax(axis=2)[..., None]
    rest = _UNITS - units.sum(axis=2, keepdims=True)
    np.put_along_axis(units, largest, np.take_along_axis(units, largest, axis=2) + rest, axis=2)
    found: NDArray[np.float32] = (units / _UNITS).astype(np.float32)
    return found
