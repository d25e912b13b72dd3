"""Views: augmented versions of images, drawn and applied a batch at a time.

What a view changes is a pure function of (seed, sample id, view number), so that a teacher's answer to a view can be
stored and the view replayed exactly.  Order: crop, shift, mirrors, turn, colours, policy, erasing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.crops import draw_boxes, resized_crops
from potstill.data.draws import another_seed, uniform, words
from potstill.data.operations import Operation, chain
from potstill.data.preprocess import centre
from potstill.data.settings import AugmentSettings

Ids = NDArray[np.int64]


class Views:
    """``Views(...)(squares, ids, view)``: uint8 [B, 3, R, R] -> uint8 [B, 3, size, size].

    Args:
        augment: what a view may change.
        size: side of a view, in pixels; at most R.
        seed: of the draws.
        strong: other draws than without, and RandAugment(2, 10) on top: the second view that MLLD and CRLD use.
    """

    def __init__(self, augment: AugmentSettings, *, size: int, seed: int, strong: bool = False) -> None:
        self.augment, self.size = augment, size
        self.seed = another_seed(seed, "strong") if strong else seed
        self.shift = round(augment.pad_crop * size)
        self.operations: list[Operation] = chain(augment, strong=strong)
        self.moves = self.shift > 0 or augment.hflip or augment.vflip or augment.rotate90

    def __call__(self, squares: Tensor, ids: Ids, view: Ids | int) -> Tensor:
        """The views of samples ``ids`` [B] with view number ``view`` (one for all, or [B])."""
        if self.augment.crop_scale is not None:
            boxes = draw_boxes(self.augment.crop_scale, squares.shape[-1], self.seed, ids, view)
            images = resized_crops(squares, boxes, self.size)
        else:
            images = centre(squares, self.size)
        if self.moves:
            images = _gather(images, self._pixel_map(ids, view))
        if self.operations:
            images = self._operate(images, ids, view)
        return images

    def _pixel_map(self, ids: Ids, view: Ids | int) -> NDArray[np.int64]:
        """[B, size * size]: for each pixel of a view, the pixel of the crop that it shows; size * size: black."""
        size, augment = self.size, self.augment
        line = np.arange(size)
        row = np.broadcast_to(line, (len(ids), size))
        column = row
        if self.shift:
            row = self._within(row + self._offset("shift y", ids, view))
            column = self._within(column + self._offset("shift x", ids, view))
        if augment.vflip:
            row = np.where(self._coin("vflip", ids, view), row[:, ::-1], row)
        if augment.hflip:
            column = np.where(self._coin("hflip", ids, view), column[:, ::-1], column)
        pixels = row[:, :, None] * size + column[:, None, :]
        if self.shift and augment.pad_mode == "black":
            pixels = np.where((row < 0)[:, :, None] | (column < 0)[:, None, :], size * size, pixels)
        if augment.rotate90:
            turns = (uniform(self.seed, "rotate90", ids, view) * 4).astype(np.int64)
            for quarter in (1, 2, 3):
                chosen = turns == quarter
                pixels[chosen] = np.rot90(pixels[chosen], quarter, axes=(1, 2))
        return pixels.reshape(len(ids), -1)

    def _within(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions outside the crop mirrored at its borders, or -1 where they shall be black."""
        if self.augment.pad_mode == "reflect":
            return _reflected(position, self.size)
        return np.where((position >= 0) & (position < self.size), position, -1)

    def _offset(self, field: str, ids: Ids, view: Ids | int) -> NDArray[np.int64]:
        """[B, 1] whole numbers from -shift to shift, each equally likely."""
        drawn = uniform(self.seed, field, ids, view)[:, None] * (2 * self.shift + 1)
        return drawn.astype(np.int64) - self.shift

    def _coin(self, field: str, ids: Ids, view: Ids | int) -> NDArray[np.bool_]:
        return uniform(self.seed, field, ids, view)[:, None] < 0.5

    def _operate(self, images: Tensor, ids: Ids, view: Ids | int) -> Tensor:
        """Torchvision's operations draw from torch's global CPU generator: each image gets its own seed there, and
        the state from before is put back.
        """
        seeds = words(self.seed, "operations", ids, view) >> np.uint64(1)
        generator = torch.default_generator
        before = generator.get_state()
        try:
            changed = []
            for image, seed in zip(images, seeds.tolist(), strict=True):
                generator.manual_seed(seed)
                for operation in self.operations:
                    image = operation(image)
                changed.append(image)
        finally:
            generator.set_state(before)
        return torch.stack(changed)


def _reflected(position: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Positions outside [0, size) mirrored at the borders, which are not repeated: -1 -> 1, size -> size - 2."""
    reflected: NDArray[np.int64] = size - 1 - np.abs(size - 1 - np.abs(position))
    return reflected


def _gather(images: Tensor, pixels: NDArray[np.int64]) -> Tensor:
    batch, channels, size, _ = images.shape
    index = torch.from_numpy(pixels).to(images.device)[:, None].expand(-1, channels, -1)
    flat = images.reshape(batch, channels, -1)
    if pixels.max() == size * size:
        flat = F.pad(flat, (0, 1))  # one black pixel behind the others
    return flat.gather(2, index).view(batch, channels, size, size)
