"""Layouts of feature maps: channels first, channels last, or tokens."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from potstill.errors import UsageError

Layout = Literal["NCHW", "NHWC", "tokens"]

MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens before the patches


@dataclass(frozen=True)
class Grid:
    """Shape and layout of a feature map."""

    layout: Layout
    channels: int
    height: int
    width: int
    prefix: int = 0  # tokens before those of the grid

    @property
    def area(self) -> int:
        """Number of positions."""
        return self.height * self.width

    def to_map(self, tensor: Tensor) -> Tensor:
        """Return the tensor as [B, C, H, W], without prefix tokens.

        Example:
            >>> import torch
            >>> tokens = torch.tensor([[[9.0], [1.0], [2.0], [3.0], [4.0]]])  # a class token, then 2 x 2 patches
            >>> Grid("tokens", 1, 2, 2, prefix=1).to_map(tokens)
            tensor([[[[1., 2.],
                      [3., 4.]]]])
        """
        if self.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            columns = tensor[:, self.prefix :].transpose(1, 2)
            return columns.reshape(len(tensor), self.channels, *self._places(columns.shape[2]))
        return tensor

    def _places(self, count: int) -> tuple[int, int]:
        """Return height and width for a number of tokens, with the known aspect ratio at another size."""
        height = round(math.sqrt(count * self.height / self.width))
        width = count // max(height, 1)
        if height * width != count:
            raise UsageError(f"{count} tokens do not fill a grid like {self.height} x {self.width}; keep all patches")
        return height, width


class LayoutDetector:
    """Recognises maps by their shapes: a map has the aspect ratio of the image.

    Args:
        image: shape [B, C, H, W] of the images that the network reads.
    """

    def __init__(self, image: Iterable[int]) -> None:
        self.batch, _, self.height, self.width = image
        self.order: Layout = "NCHW"  # of the last unambiguous map
        self.patches: list[Grid] = []  # maps so far, which may be flattened to tokens

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """Return the grid of a tensor of this shape; None if it is no map."""
        if len(shape) == 3 and shape[0] == self.batch:
            return self._tokens(shape[1], shape[2])
        if len(shape) != 4 or shape[0] != self.batch:
            return None
        first = self._fits(shape[2], shape[3])
        last = self._fits(shape[1], shape[2])
        if first != last:
            self.order = "NCHW" if first else "NHWC"
        if not (first or last):
            return None
        if self.order == "NHWC":
            return self._seen(Grid("NHWC", shape[3], shape[1], shape[2]))
        return self._seen(Grid("NCHW", shape[1], shape[2], shape[3]))

    def _seen(self, grid: Grid) -> Grid:
        self.patches.append(grid)
        return grid

    def _fits(self, height: int, width: int) -> bool:
        """Return whether the shape has the image's aspect ratio within one pixel; square for square images."""
        return abs(height * self.width - width * self.height) < max(self.height, self.width)

    def _tokens(self, count: int, channels: int) -> Grid | None:
        for seen in reversed(self.patches):
            if seen.channels == channels and 0 <= count - seen.area <= MAX_PREFIX_TOKENS and count > 1:
                return Grid("tokens", channels, seen.height, seen.width, count - seen.area)
        highest = round(math.sqrt(count * self.height / self.width))
        for height in range(highest, 0, -1):
            width = round(height * self.width / self.height)
            if width and 0 <= count - height * width <= MAX_PREFIX_TOKENS and count > 1:
                return Grid("tokens", channels, height, width, count - height * width)
        return None
