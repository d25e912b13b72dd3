"""Batch transforms of tensors: centre crop, normalisation, shifts, flips, quarter turns, random resized crops, erasing.

Boxes and offsets are drawn for a whole batch at once.  A random resized crop is a weighted sum of a few rows and
columns for each pixel.  Random erasing: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020,
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

from potstill.data.image_io import Pixels
from potstill.data.preprocessing import crop_to_input, normalize_array, scale_and_shift
from potstill.data.samplers import CounterRNG
from potstill.data.settings import AugmentSettings
from potstill.input_spec import InputSpec, Triple

_MAX_VALUES = 2**18  # pixel values, so that intermediate results stay in a core's cache


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; only CUDA, which reads pageable memory before it returns, without waiting."""
    return values.to(device, non_blocking=device.type == "cuda")


def batch_slices(images: Tensor) -> Iterator[slice]:
    """Yield slices of a batch [B, 3, H, W]: a few images each on a CPU, all at once on other devices."""
    step = max(1, _MAX_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)
    for first in range(0, len(images), step):
        yield slice(first, first + step)


def preprocess(pixels: Pixels, spec: InputSpec) -> Tensor:
    """Preprocess one decoded image for a network, with the same result as a ``Loader`` without augmentation.

    Args:
        pixels: uint8 [H, W, 3].
        spec: size, resize mode and normalisation.

    Returns:
        float32 [3, size, size].
    """
    return torch.from_numpy(normalize_array(crop_to_input(pixels, spec), spec))


def center_crop(images: Tensor, size: int) -> Tensor:
    """Return the centred square: [B, 3, R, R] -> [B, 3, size, size]."""
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]


def normalize(images: Tensor, spec: InputSpec) -> Tensor:
    """Return (x / 255 - mean) / std: uint8 [B, 3, S, S] -> contiguous float32 of the same shape."""
    scale, shift = _scale_and_shift(spec.mean, spec.std, images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift)


@lru_cache(maxsize=16)  # avoids a copy to the device for each batch
@torch.inference_mode(False)
def _scale_and_shift(mean: Triple, std: Triple, device: torch.device) -> tuple[Tensor, Tensor]:
    scale, shift = (torch.from_numpy(each.copy())[None].to(device) for each in scale_and_shift(mean, std))
    return scale, shift


Boxes = NDArray[np.int64]

_ATTEMPTS = 10


class ViewSize(NamedTuple):
    """Sizes in whose pixels the boxes and shifts of a view are drawn, then scaled and rounded to whole pixels of the
    output, so that a teacher's view shows the same part of the image as its student's to within half a pixel.
    """

    side: int  # R, of the square from which crops are taken
    size: int  # S, of the view


def sample_boxes(
    scale: tuple[float, float],
    ratio: tuple[float, float],
    side: int,
    draws: CounterRNG,
    field: str,
    aspects: NDArray[np.float64] | None = None,
) -> tuple[Boxes, NDArray[np.bool_]]:
    """Return boxes (top, left, height, width) in a square, int64 [B, 4], and which of them fit, bool [B].

    As torchvision's ``RandomResizedCrop``: the area is uniform in ``scale`` (shares of the square), the logarithm of
    width / height is uniform between those of ``ratio``; ten attempts to fit, then the whole square.

    If the squares are stretched images, a box has these areas and ratios in the image itself.  If no attempt fits an
    image longer than ``ratio``, torchvision takes its centre, and never shows its ends; here its largest box of that
    ratio is taken at a random position.

    ``scale`` and ``ratio`` are ranges; ``aspects`` [B] are width / height of the images that the squares show; None: 1.
    """
    boxes = np.tile(np.array([0, 0, side, side], dtype=np.int64), (len(draws), 1))
    stretched: NDArray[np.float64] = np.ones(len(draws)) if aspects is None else aspects
    missing = np.ones(len(draws), dtype=np.bool_)
    low, high = np.log(ratio)
    for attempt in range(_ATTEMPTS):

        def draw(name: str, attempt: int = attempt) -> NDArray[np.float64]:
            return draws(f"{field} {name} {attempt}")

        area = side * side * (scale[0] + (scale[1] - scale[0]) * draw("area"))
        aspect = np.exp(low + (high - low) * draw("ratio")) / stretched
        width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = missing & (width > 0) & (width <= side) & (height > 0) & (height <= side)
        top = (draw("top") * (side - height + 1)).astype(np.int64)
        left = (draw("left") * (side - width + 1)).astype(np.int64)
        boxes[fits] = np.stack([top, left, height, width], axis=1)[fits]
        missing &= ~fits
        if not missing.any():
            break
    longer = missing & ((stretched < ratio[0]) | (stretched > ratio[1]))
    if aspects is not None and longer.any():
        aspect = stretched.clip(*ratio) / stretched
        width = np.rint(side * aspect.clip(max=1)).astype(np.int64).clip(min=1)
        height = np.rint(side / aspect.clip(min=1)).astype(np.int64).clip(min=1)
        top = (draws(f"{field} last top") * (side - height + 1)).astype(np.int64)
        left = (draws(f"{field} last left") * (side - width + 1)).astype(np.int64)
        boxes[longer] = np.stack([top, left, height, width], axis=1)[longer]
    return boxes, ~missing


def scale_boxes(boxes: Boxes, side: int, to: int) -> Boxes:
    """Scale boxes (top, left, height, width), int64 [B, 4], to another square; edges are rounded.

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
    """The row and column of an S x S image that each row and column of a view shows; then an optional transposition."""

    rows: Tensor  # int64 [B, S], in [0, S)
    columns: Tensor  # int64 [B, S], in [0, S)
    black: Tensor | None  # bool [B, 1, S, S], pixels beyond the border, before the transposition
    transposed: Tensor | None  # bool [B]


def draw_grid(
    augment: AugmentSettings, size: int, draws: CounterRNG, device: torch.device, drawn_size: int | None = None
) -> SamplingGrid:
    """Draw shifts, flips and rotations of views of ``size`` pixels; shifts are drawn in pixels of ``drawn_size``."""
    drawn_size = drawn_size or size
    shift, count = round(augment.pad_crop * drawn_size), len(draws)
    quarters = (draws("rotate90") * 4).astype(np.int64) if augment.rotate90 else np.zeros(count, dtype=np.int64)
    flipped_rows = (augment.vflip and draws("vflip") < 0.5) ^ (quarters >= 2)
    flipped_columns = (augment.hflip and draws("hflip") < 0.5) ^ ((quarters == 1) | (quarters == 2))
    lines, black = [], []
    for axis, reverse in (("y", flipped_rows), ("x", flipped_columns)):
        offset = np.floor(draws(f"shift {axis}") * (2 * shift + 1)) - shift if shift else np.zeros(count)
        offset = np.rint(offset * size / drawn_size)
        line = _line(size, offset.astype(np.int64), reverse, device)
        inside = (line >= 0) & (line < size)
        black.append(~inside)
        lines.append(
            (size - 1 - (size - 1 - line.abs()).abs()) if augment.pad_mode == "reflect" else line.clamp(0, size - 1)
        )
    has_black = shift > 0 and augment.pad_mode == "black"
    rows, columns = lines
    return SamplingGrid(
        rows,
        columns,
        black=(black[0][:, :, None] | black[1][:, None, :])[:, None] if has_black else None,
        transposed=to_device(torch.from_numpy(quarters % 2 == 1), device) if augment.rotate90 else None,
    )


def sample_grid(images: Tensor, grid: SamplingGrid) -> Tensor:
    """Return the grid's pixels of the centre crop: uint8 [B, 3, R, R] -> uint8 [B, 3, S, S]."""
    batch, channels, side, _ = images.shape
    size = grid.rows.shape[1]
    start = (side - size) // 2
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * side
    rows = images.reshape(-1, side).index_select(0, (first + (start + grid.rows)[:, None]).view(-1))
    columns = (start + grid.columns)[:, None].expand(-1, channels * size, -1)
    return apply_fill_and_rotation(
        rows.view(batch, channels * size, side).gather(2, columns).view(batch, channels, size, size), grid
    )


def apply_fill_and_rotation(images: Tensor, grid: SamplingGrid) -> Tensor:
    """Apply the grid's black pixels and transposition to images whose rows and columns were sampled."""
    if grid.black is not None:
        images = images.masked_fill(grid.black, 0)
    if grid.transposed is not None:
        images = torch.where(grid.transposed.view(-1, 1, 1, 1), images.transpose(2, 3), images)
    return images


def _line(size: int, offset: NDArray[np.int64], reverse: NDArray[np.bool_], device: torch.device) -> Tensor:
    """Return 0 to S - 1, reversed where ``reverse`` is True, plus the offset; [B, S]."""
    first = to_device(torch.from_numpy(np.where(reverse, size - 1, 0) + offset), device)[:, None]
    step = to_device(torch.from_numpy(np.where(reverse, -1, 1)), device)[:, None]
    return first + step * torch.arange(size, device=device)


CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a crop: the default of RandomResizedCrop
_UNITS = 2**11
_INTERMEDIATE_LEVELS = 2**4  # between two integers, after the first direction


def resized_crops(images: Tensor, boxes: Boxes, grid: SamplingGrid) -> Tensor:
    """Crop each image to its box (top, left, height, width) and resize the crop, bilinear with antialiasing.

    Separable: a weighted sum of a few pixels of a row, then of a column.  All sums are exact in float32 (8 + 11 bits,
    rounded to 12; 12 + 11 bits), so that a view depends on no batch size, thread, device or library.  uint8 [B, 3, S,
    S], within 1 of torchvision's ``resized_crop``; ``grid``: the row and column that each pixel shows.
    """
    box = torch.from_numpy(boxes.T.reshape(2, 2, -1).copy())  # (top, left), (height, width)
    # Divided on the CPU: some devices multiply by the reciprocal, which rounds twice.
    scale = to_device((box[1] / grid.rows.shape[1]).float(), images.device)
    starts, lengths = to_device(box, images.device)
    weights, index = _weights(torch.stack([grid.rows, grid.columns]), starts, lengths, scale, images.shape[-1])
    (rows, columns), (row_index, column_index) = weights, index
    size = rows.shape[1]
    resized = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8, device=images.device)
    for some in batch_slices(images):
        part, down_from, across_from = images[some], row_index[some], column_index[some]
        if len(part) == 1:  # a large image: only its box is converted, outside of which weights are 0
            top, left, height, width = boxes[some.start].tolist()
            part = part[..., top : top + height, left : left + width]
            down_from, across_from = (down_from - top).clamp_(0, height - 1), (across_from - left).clamp_(0, width - 1)
        # Rows are contiguous in memory: columns are summed as rows of the transposed images.
        transposed = part.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        across = _weighted_rows(transposed, columns[some] * _INTERMEDIATE_LEVELS, across_from).round_()
        across = across.transpose(2, 3).contiguous()
        down = _weighted_rows(across, rows[some] / _INTERMEDIATE_LEVELS, down_from).round_()
        resized[some] = down.to(torch.int16)  # converting to uint8 is faster from int16
    return apply_fill_and_rotation(resized, grid)


def _weighted_rows(images: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Return for each target row the weighted sum of T source rows: [B, 3, R, W] -> [B, 3, S, W]."""
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


def _weights(positions: Tensor, start: Tensor, length: Tensor, scale: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return weights and indices of the source pixels of each target pixel, float32 and int64 [.., B, S, T].

    A triangle as wide as two source pixels, or two target pixels if the image shrinks (antialiasing), clipped at the
    box and normalised; in multiples of 2**-11 that add up to 1, by no sum over an axis, whose order depends on the
    library. ``scale`` is source pixels for one target pixel.
    """
    size = positions.shape[-1]
    taps = math.ceil(2 * max(1.0, side / size))  # integers within the widest triangle
    length, scale = length[..., None], scale[..., None]
    support = scale.clamp(min=1)
    target = (positions.to(torch.float32) + 0.5) * scale  # centres of the view's pixels, in pixels of the box
    first = (target - support - 0.5).ceil()
    sums, total = [], torch.zeros_like(target)
    for tap in range(taps):
        source = first + tap
        weight = (1 - (source + 0.5 - target).abs() / support).clamp_(min=0)
        total = total + weight.mul_((source >= 0) & (source < length))
        sums.append(total)
    edges = torch.stack([torch.zeros_like(total), *(each / total for each in sums)], dim=-1)
    weights = edges.mul_(_UNITS).round_().diff(dim=-1) / _UNITS  # differences of rounded sums add up to exactly 1
    index = first.to(torch.int64)[..., None] + (start[..., None, None] + torch.arange(taps, device=start.device))
    return weights, index.clamp_(0, side - 1)


ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # of the area, and height / width: as torchvision's


def random_erase(images: Tensor, probability: float, draws: CounterRNG, drawn_size: int | None = None) -> Tensor:
    """Fill a rectangle of 2 to 33 % of the area with black in a share of uint8 [B, 3, S, S]."""
    size = images.shape[-1]
    drawn, fits = sample_boxes(ERASE_SCALE, ERASE_RATIO, drawn_size or size, draws, "erase")
    boxes = scale_boxes(drawn, drawn_size or size, size)
    boxes[~(fits & (draws("erase") < probability)), 2:] = 0
    top, left, height, width = to_device(torch.from_numpy(boxes), images.device).T[:, :, None]
    line = torch.arange(size, device=images.device)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
