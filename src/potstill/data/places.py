"""Which pixel of an image each row and column of a view shows: shifts, mirrors and quarter turns of a whole batch."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.draws import Draws
from potstill.data.settings import AugmentSettings


@dataclass(frozen=True)
class Places:
    """For views of S x S pixels of a crop of as many; where ``turned``, rows and columns are exchanged at last."""

    rows: Tensor  # int64 [B, S], in [0, S)
    columns: Tensor  # likewise
    black: Tensor | None  # bool [B, 1, S, S]: beyond the border, before rows and columns are exchanged
    turned: Tensor | None  # bool [B]


def draw_places(augment: AugmentSettings, size: int, draws: Draws, device: torch.device) -> Places:
    """First the shift, then mirrors, then the turn.

    Args:
        augment: which of them are asked for.
        size: S.
        draws: of B samples.
        device: where the places are wanted.
    """
    shift, count = round(augment.pad_crop * size), len(draws)
    quarters = (draws("rotate90") * 4).astype(np.int64) if augment.rotate90 else np.zeros(count, dtype=np.int64)
    upside_down = (augment.vflip and draws("vflip") < 0.5) ^ (quarters >= 2)
    mirrored = (augment.hflip and draws("hflip") < 0.5) ^ ((quarters == 1) | (quarters == 2))
    lines, black = [], []
    for axis, reverse in (("y", upside_down), ("x", mirrored)):
        offset = np.floor(draws(f"shift {axis}") * (2 * shift + 1)) - shift if shift else np.zeros(count)
        line = _line(size, offset.astype(np.int64), reverse, device)
        inside = (line >= 0) & (line < size)
        black.append(~inside)
        lines.append(_reflected(line, size) if augment.pad_mode == "reflect" else line.clamp(0, size - 1))
    blackens = shift > 0 and augment.pad_mode == "black"
    rows, columns = lines
    return Places(
        rows,
        columns,
        black=(black[0][:, :, None] | black[1][:, None, :])[:, None] if blackens else None,
        turned=_on(quarters % 2 == 1, device) if augment.rotate90 else None,
    )


def pick(images: Tensor, places: Places) -> Tensor:
    """uint8 [B, 3, R, R] -> uint8 [B, 3, S, S]: what those rows and columns of the centre show."""
    batch, channels, side, _ = images.shape
    size = places.rows.shape[1]
    start = (side - size) // 2
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * side
    rows = images.reshape(-1, side).index_select(0, (first + (start + places.rows)[:, None]).view(-1))
    columns = (start + places.columns)[:, None].expand(-1, channels * size, -1)
    return finish(rows.view(batch, channels * size, side).gather(2, columns).view(batch, channels, size, size), places)


def finish(images: Tensor, places: Places) -> Tensor:
    """What is left to do where rows and columns stand in their places."""
    if places.black is not None:
        images = images.masked_fill(places.black, 0)
    if places.turned is not None:
        images = torch.where(places.turned.view(-1, 1, 1, 1), images.transpose(2, 3), images)
    return images


def _line(size: int, offset: NDArray[np.int64], reverse: NDArray[np.bool_], device: torch.device) -> Tensor:
    """[B, S]: 0 to S - 1, or backwards where reversed, moved by the offset."""
    first = _on(np.where(reverse, size - 1, 0) + offset, device)[:, None]
    step = _on(np.where(reverse, -1, 1), device)[:, None]
    return first + step * torch.arange(size, device=device)


def _reflected(position: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) mirrored at the borders, which are not repeated: -1 -> 1, size -> size - 2."""
    return size - 1 - (size - 1 - position.abs()).abs()


def _on(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
