"""Rectangles within squares, drawn for a whole batch: what random resized crops show, and what is erased."""

import numpy as np
from numpy.typing import NDArray

from potstill.data.draws import Draws

Boxes = NDArray[np.int64]

_ATTEMPTS = 10


def draw_boxes(
    scale: tuple[float, float], ratio: tuple[float, float], side: int, draws: Draws, field: str
) -> tuple[Boxes, NDArray[np.bool_]]:
    """Boxes (top, left, height, width) in a square, int64 [B, 4], and which of them were found, bool [B].

    As torchvision's ``RandomResizedCrop``: the area is uniform in ``scale`` (shares of the square), the logarithm of
    width / height is uniform between those of ``ratio``; ten attempts to fit, then the whole square.

    Args:
        scale: smallest and largest share.
        ratio: smallest and largest width / height.
        side: of the square, in pixels.
        draws: of B samples.
        field: beginning of the fields that are drawn.
    """
    boxes = np.tile(np.array([0, 0, side, side], dtype=np.int64), (len(draws), 1))
    missing = np.ones(len(draws), dtype=np.bool_)
    low, high = np.log(ratio)
    for attempt in range(_ATTEMPTS):

        def draw(what: str, attempt: int = attempt) -> NDArray[np.float64]:
            return draws(f"{field} {what} {attempt}")

        area = side * side * (scale[0] + (scale[1] - scale[0]) * draw("area"))
        shape = np.exp(low + (high - low) * draw("ratio"))
        width = np.rint(np.sqrt(area * shape)).astype(np.int64)
        height = np.rint(np.sqrt(area / shape)).astype(np.int64)
        fits = missing & (width > 0) & (width <= side) & (height > 0) & (height <= side)
        top = (draw("top") * (side - height + 1)).astype(np.int64)
        left = (draw("left") * (side - width + 1)).astype(np.int64)
        boxes[fits] = np.stack([top, left, height, width], axis=1)[fits]
        missing &= ~fits
        if not missing.any():
            break
    return boxes, ~missing
