"""Random resized crops of a whole batch: boxes drawn together, resized by a few weighted rows and columns each."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.boxes import Boxes
from potstill.data.chunks import slices
from potstill.data.places import Places, finish

RATIO = (3 / 4, 4 / 3)  # width / height of a crop, as everybody draws them
_UNITS = 2**11
_BETWEEN = 2**4  # levels between two whole ones that are kept between the two directions


def resized_crops(images: Tensor, boxes: Boxes, places: Places) -> Tensor:
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
    for some in slices(images):
        # Rows are contiguous in memory: columns are added as rows of the transposed images.
        turned = images[some].transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        across = _weighted_rows(turned, columns[some] * _BETWEEN, which_columns[some]).round_()
        across = across.transpose(2, 3).contiguous()
        found = _weighted_rows(across, rows[some] / _BETWEEN, which_rows[some]).round_()
        resized[some] = found.to(torch.int16)  # from which bytes are made faster
    return finish(resized, places)


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
