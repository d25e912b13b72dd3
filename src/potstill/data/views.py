"""Views: augmented versions of images, drawn and applied a batch at a time.

What a view changes is a pure function of (seed, sample id, view number), so that a teacher's answer to a view can be
stored and the view replayed exactly.  Order: crop, shift, mirrors, turn, colours, policy, erasing.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.boxes import draw_boxes
from potstill.data.colours import jitter
from potstill.data.crops import RATIO, resized_crops
from potstill.data.draws import Draws, another_seed
from potstill.data.erasing import erase
from potstill.data.operations import POLICIES, STRONG
from potstill.data.places import draw_places, pick
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
        self.policies = [POLICIES[augment.policy]] if augment.policy != "none" else []
        if strong:
            self.policies.append(STRONG)
        self.moves = augment.pad_crop > 0 or augment.hflip or augment.vflip or augment.rotate90

    def __call__(self, squares: Tensor, ids: Ids, view: Ids | int) -> Tensor:
        """The views of samples ``ids`` [B] with view number ``view`` (one for all, or [B])."""
        draws = Draws(self.seed, ids, view)
        images = self._moved(squares, draws)
        if self.augment.color_jitter:
            images = jitter(images, self.augment.color_jitter, draws)
        for policy in self.policies:
            images = policy(images, draws)
        if self.augment.erasing:
            images = erase(images, self.augment.erasing, draws)
        return images

    def _moved(self, squares: Tensor, draws: Draws) -> Tensor:
        scale = self.augment.crop_scale
        if scale is None and not self.moves:
            return centre(squares, self.size)
        places = draw_places(self.augment, self.size, draws, squares.device)
        if scale is None:
            return pick(squares, places)
        boxes, _ = draw_boxes(scale, RATIO, squares.shape[-1], draws, "crop")
        return resized_crops(squares, boxes, places)
