"""Views: augmented versions of images, drawn and applied a batch at a time.

What a view changes is a pure function of (seed, sample id, view number), so that a teacher's answer to a view can be
stored and the view replayed exactly.  Order: crop, shift, mirrors, turn, colours, policy, erasing.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.crops import draw_boxes, resized_crops
from potstill.data.draws import uniform, words
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
    """

    def __init__(self, augment: AugmentSettings, *, size: int, seed: int) -> None:
        self.augment, self.size, self.seed = augment, size, seed
        self.shift = round(augment.pad_crop * size)
        self.operations: list[Operation] = chain(augment)
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
        """[B, size * size]: for each pixel of a view, the pixel of the crop that it shows."""
        size, augment = self.size, self.augment
        line = np.arange(size)
        row = np.broadcast_to(line, (len(ids), size))
        column = row
        if self.shift:
            row = _reflected(row + self._offset("shift y", ids, view), size)
            column = _reflected(column + self._offset("shift x", ids, view), size)
        if augment.vflip:
            row = np.where(self._coin("vflip", ids, view), row[:, ::-1], row)
        if augment.hflip:
            column = np.where(self._coin("hflip", ids, view), column[:, ::-1], column)
        pixels = row[:, :, None] * size + column[:, None, :]
        if augment.rotate90:
            turns = (uniform(self.seed, "rotate90", ids, view) * 4).astype(np.int64)
            for quarter in (1, 2, 3):
                chosen = turns == quarter
                pixels[chosen] = np.rot90(pixels[chosen], quarter, axes=(1, 2))
        return pixels.reshape(len(ids), -1)

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
    return images.reshape(batch, channels, -1).gather(2, index).view(batch, channels, size, size)
