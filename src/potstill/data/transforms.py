"""Batch transforms of tensors: centre crop, normalisation, shifts, flips, quarter turns, random resized crops, erasing.

Boxes and offsets are drawn for a whole batch at once.  A random resized crop is a few weighted rows and columns for
each pixel.  Random erasing: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020,
https://arxiv.org/abs/1708.04896.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.counter_rng import CounterRNG
from potstill.data.image_io import Pixels
from potstill.data.preprocessing import decoded_side as packed_side
from potstill.data.preprocessing import resize_to_square as fit
from potstill.data.settings import AugmentSettings
from potstill.input_spec import InputSpec, Triple

_MAX_VALUES = 2**18  # pixel values, so that intermediate results stay in the cache of a CPU's core


def batch_slices(images: Tensor) -> Iterator[slice]:
    """Consecutive images of a batch [B, 3, H, W], a few at a time on a CPU, all together elsewhere."""
    step = max(1, _MAX_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)
    for first in range(0, len(images), step):
        yield slice(first, first + step)


def preprocess(pixels: Pixels, spec: InputSpec) -> Tensor:
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
    return normalize(center_crop(square[None], spec.size), spec)[0]


def center_crop(images: Tensor, size: int) -> Tensor:
    """The centred square: [B, 3, R, R] -> [B, 3, size, size]."""
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]


def normalize(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 of the same shape, contiguous: (x / 255 - mean) / std."""
    scale, shift = _scale_and_shift(spec.mean, spec.std, images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift)


@lru_cache(maxsize=16)  # a batch need not wait for six numbers to reach the device
@torch.inference_mode(False)
def _scale_and_shift(mean: Triple, std: Triple, device: torch.device) -> tuple[Tensor, Tensor]:
    means, deviations = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (mean, std))
    return (1 / (255 * deviations)).float().to(device), (means / deviations).float().to(device)


Boxes = NDArray[np.int64]

_ATTEMPTS = 10


class ViewSize(NamedTuple):
    """The pixels in which a view is drawn.

    A view may be shown at another size than it is drawn in: a teacher's is drawn in its student's pixels.  Boxes and
    shifts are then scaled and rounded to whole pixels, so that both sizes show the same part of the image to within
    half a pixel of the size that is shown.
    """

    side: int  # R, of the square that crops are cut from
    size: int  # S, of the view


def sample_boxes(
    scale: tuple[float, float], ratio: tuple[float, float], side: int, draws: CounterRNG, field: str
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


def scale_boxes(boxes: Boxes, side: int, to: int) -> Boxes:
    """Boxes of a square of ``side`` pixels in a square of ``to`` pixels; edges are rounded to whole pixels.

    Args:
        boxes: (top, left, height, width), int64 [B, 4], of at least one pixel each.
        side: of the square in which they are drawn.
        to: of the other square.

    Example:
        >>> scale_boxes(np.array([[2, 0, 3, 8], [7, 7, 1, 1]]), 8, 20)
        array([[ 5,  0,  7, 20],
               [18, 18,  2,  2]])
    """
    if side == to:
        return boxes
    first = np.rint(boxes[:, :2] * to / side).astype(np.int64).clip(max=to - 1)
    last = np.rint((boxes[:, :2] + boxes[:, 2:]) * to / side).astype(np.int64)
    return np.concatenate([first, (last - first).clip(min=1)], axis=1)


@dataclass(frozen=True)
class SamplingGrid:
    """For views of S x S pixels of a crop of as many; where ``turned``, rows and columns are exchanged at last."""

    rows: Tensor  # int64 [B, S], in [0, S)
    columns: Tensor  # likewise
    black: Tensor | None  # bool [B, 1, S, S]: beyond the border, before rows and columns are exchanged
    turned: Tensor | None  # bool [B]


def draw_grid(
    augment: AugmentSettings, size: int, draws: CounterRNG, device: torch.device, drawn_size: int | None = None
) -> SamplingGrid:
    """First the shift, then mirrors, then the turn.

    Args:
        augment: which of them are asked for.
        size: S.
        draws: of B samples.
        device: where the places are wanted.
        drawn_size: of the view in whose pixels shifts are drawn; None: S.
    """
    drawn_size = drawn_size or size
    shift, count = round(augment.pad_crop * drawn_size), len(draws)
    quarters = (draws("rotate90") * 4).astype(np.int64) if augment.rotate90 else np.zeros(count, dtype=np.int64)
    upside_down = (augment.vflip and draws("vflip") < 0.5) ^ (quarters >= 2)
    mirrored = (augment.hflip and draws("hflip") < 0.5) ^ ((quarters == 1) | (quarters == 2))
    lines, black = [], []
    for axis, reverse in (("y", upside_down), ("x", mirrored)):
        offset = np.floor(draws(f"shift {axis}") * (2 * shift + 1)) - shift if shift else np.zeros(count)
        offset = np.rint(offset * size / drawn_size)
        line = _line(size, offset.astype(np.int64), reverse, device)
        inside = (line >= 0) & (line < size)
        black.append(~inside)
        lines.append(_reflect(line, size) if augment.pad_mode == "reflect" else line.clamp(0, size - 1))
    blackens = shift > 0 and augment.pad_mode == "black"
    rows, columns = lines
    return SamplingGrid(
        rows,
        columns,
        black=(black[0][:, :, None] | black[1][:, None, :])[:, None] if blackens else None,
        turned=_to_device(quarters % 2 == 1, device) if augment.rotate90 else None,
    )


def sample_grid(images: Tensor, places: SamplingGrid) -> Tensor:
    """uint8 [B, 3, R, R] -> uint8 [B, 3, S, S]: what those rows and columns of the centre show."""
    batch, channels, side, _ = images.shape
    size = places.rows.shape[1]
    start = (side - size) // 2
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * side
    rows = images.reshape(-1, side).index_select(0, (first + (start + places.rows)[:, None]).view(-1))
    columns = (start + places.columns)[:, None].expand(-1, channels * size, -1)
    return apply_fill_and_rotation(
        rows.view(batch, channels * size, side).gather(2, columns).view(batch, channels, size, size), places
    )


def apply_fill_and_rotation(images: Tensor, places: SamplingGrid) -> Tensor:
    """What is left to do where rows and columns stand in their places."""
    if places.black is not None:
        images = images.masked_fill(places.black, 0)
    if places.turned is not None:
        images = torch.where(places.turned.view(-1, 1, 1, 1), images.transpose(2, 3), images)
    return images


def _line(size: int, offset: NDArray[np.int64], reverse: NDArray[np.bool_], device: torch.device) -> Tensor:
    """[B, S]: 0 to S - 1, or backwards where reversed, moved by the offset."""
    first = _to_device(np.where(reverse, size - 1, 0) + offset, device)[:, None]
    step = _to_device(np.where(reverse, -1, 1), device)[:, None]
    return first + step * torch.arange(size, device=device)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) mirrored at the borders, which are not repeated: -1 -> 1, size -> size - 2."""
    return size - 1 - (size - 1 - position.abs()).abs()


def _to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, as everybody draws them
_UNITS = 2**11
_INTERMEDIATE_LEVELS = 2**4  # levels between two whole ones that are kept between the two directions


def resized_crops(images: Tensor, boxes: Boxes, places: SamplingGrid) -> Tensor:
    """Crop each image to its box and resize that, bilinear with antialiasing.

    Bilinear resizing is separable: a pixel is a sum of few pixels of its row, then of few of its column.  All sums are
    exact in float32 (8 + 11 bits, rounded to 12; 12 + 11 bits), so that a view depends neither on the order of
    summation nor, with it, on batch size, threads, device or library.

    Args:
        images: uint8 [B, 3, R, R].
        boxes: (top, left, height, width), int64 [B, 4].
        places: which row and column of the resized crop each pixel of the view shows.

    Returns:
        uint8 [B, 3, S, S], within 1 of ``torchvision.transforms.v2.functional.resized_crop``.
    """
    box = torch.from_numpy(boxes.T.reshape(2, 2, -1).copy())  # (top, left), (height, width)
    # Divided before they go to the device: some multiply by the inverse of a number instead, which rounds twice.
    scale = (box[1] / places.rows.shape[1]).to(images.device, torch.float32, non_blocking=True)
    starts, lengths = box.to(images.device, non_blocking=True)
    both = _weights(torch.stack([places.rows, places.columns]), starts, lengths, scale, images.shape[-1])
    (rows, columns), (which_rows, which_columns) = both
    size = rows.shape[1]
    resized = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8, device=images.device)
    for some in batch_slices(images):
        # Rows are contiguous in memory: columns are added as rows of the transposed images.
        turned = images[some].transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        across = _weighted_rows(turned, columns[some] * _INTERMEDIATE_LEVELS, which_columns[some]).round_()
        across = across.transpose(2, 3).contiguous()
        found = _weighted_rows(across, rows[some] / _INTERMEDIATE_LEVELS, which_rows[some]).round_()
        resized[some] = found.to(torch.int16)  # from which bytes are made faster
    return apply_fill_and_rotation(resized, places)


def _weighted_rows(images: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """[B, 3, R, W] -> [B, 3, S, W]: for each target row the sum of T source rows, weighted."""
    batch, channels, side, width = images.shape
    size, taps = weights.shape[1:]
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1, 1) * side
    summed = F.embedding_bag(
        (first + index[:, None]).view(-1, taps),
        images.view(-1, width),
        mode="sum",
        per_sample_weights=weights[:, None].expand(-1, channels, -1, -1).reshape(-1, taps),
    )
    return summed.view(batch, channels, size, width)


def _weights(places: Tensor, start: Tensor, length: Tensor, scale: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """How much of which source pixels makes a target pixel, in one direction: float32 and int64 [.., B, S, T].

    A triangle as wide as two source pixels, or two target pixels where the image shrinks (antialiasing), cut at the
    box and normalised; in whole units that add up to 2**11.  Written without sums over an axis, whose order is the
    library's: the weights too are the same everywhere.

    Args:
        places: int64 [.., B, S], in [0, S): the target pixels.
        start: int64 [.., B], of the box.
        length: int64 [.., B], of the box.
        scale: float32 [.., B], source pixels for one target pixel.
        side: R, of the source.
    """
    size = places.shape[-1]
    taps = math.ceil(2 * max(1.0, side / size))  # as many whole numbers fit into the widest triangle
    length, scale = length[..., None], scale[..., None]
    support = scale.clamp(min=1)
    target = (places.to(torch.float32) + 0.5) * scale  # centres of the view's pixels, in pixels of the box
    first = (target - support - 0.5).ceil()
    parts, so_far = [], torch.zeros_like(target)
    for tap in range(taps):
        source = first + tap
        weight = (1 - (source + 0.5 - target).abs() / support).clamp_(min=0)
        so_far = so_far + weight.mul_((source >= 0) & (source < length))
        parts.append(so_far)
    edges = torch.stack([torch.zeros_like(so_far), *(part / so_far for part in parts)], dim=-1)
    weights = edges.mul_(_UNITS).round_().diff(dim=-1) / _UNITS  # differences of rounded sums: none is lost
    index = first.to(torch.int64)[..., None] + (start[..., None, None] + torch.arange(taps, device=start.device))
    return weights, index.clamp_(0, side - 1)


ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # of the area, and height / width: as torchvision's


def random_erase(images: Tensor, probability: float, draws: CounterRNG, drawn_size: int | None = None) -> Tensor:
    """A rectangle of 2 to 33 % of the area becomes black in some of the images.

    Args:
        images: uint8 [B, 3, S, S].
        probability: of erasing, in [0, 1].
        draws: of these samples.
        drawn_size: of the view in whose pixels rectangles are drawn; None: S.

    Returns:
        The same shape and type.
    """
    size = images.shape[-1]
    drawn, found = sample_boxes(ERASE_SCALE, ERASE_RATIO, drawn_size or size, draws, "erase")
    boxes = scale_boxes(drawn, drawn_size or size, size)
    boxes[~(found & (draws("erase") < probability)), 2:] = 0
    top, left, height, width = torch.from_numpy(boxes).to(images.device, non_blocking=True).T[:, :, None]
    line = torch.arange(size, device=images.device)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
