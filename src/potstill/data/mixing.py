"""Mixup and CutMix: each image of a batch with another one, and the labels by the same shares.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al.,
"CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
https://arxiv.org/abs/1905.04899.  Which images are paired, how, and by which share follows from (seed, epoch, step).
Student and teacher see the same mixed images (Beyer et al., "Knowledge distillation: A good teacher is patient and
consistent", CVPR 2022, https://arxiv.org/abs/2106.05237).
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.draws import uniform, words
from potstill.types import Batch

_ROOM = 2**20  # hash ids of a step: more than a batch has images

Box = tuple[int, int, int, int]  # top, bottom, left, right


class Mixing:
    """``Mixing(...)(batch, epoch, step)``: the batch with mixed images and ``soft_labels``.

    Args:
        mixup: alpha of mixup's Beta(alpha, alpha), 0: off.
        cutmix: alpha of CutMix'; where both are on, each batch gets one of them, with equal chance.
        classes: K.
        seed: of the draws.
    """

    def __init__(self, *, mixup: float, cutmix: float, classes: int, seed: int) -> None:
        self.mixup, self.cutmix, self.classes, self.seed = mixup, cutmix, classes, seed

    def __call__(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``labels`` become those of the larger share."""
        order = self.order(len(batch), epoch, step).to(batch.images.device)
        others = batch.images[order]
        blends = self.cutmix == 0 or (self.mixup > 0 and self._draw("mix kind", epoch, step) < 0.5)
        if blends:
            share = self._beta(self.mixup, epoch, step)
            images = batch.images * share + others * (1 - share)
        else:
            height, width = batch.images.shape[-2:]
            centre = (self._draw("cutmix row", epoch, step), self._draw("cutmix column", epoch, step))
            box = cutmix_box(height, width, self._beta(self.cutmix, epoch, step), centre)
            images, share = _pasted(batch.images, others, box)
        soft = _one_hot(batch.labels, self.classes) * share + _one_hot(batch.labels[order], self.classes) * (1 - share)
        labels = batch.labels if share >= 0.5 else batch.labels[order]
        return replace(batch, images=images, labels=labels, soft_labels=soft)

    def order(self, count: int, epoch: int, step: int) -> Tensor:
        """int64 [count]: with which image of the batch each is mixed."""
        ids = step * _ROOM + np.arange(count, dtype=np.int64)
        return torch.from_numpy(np.argsort(words(self.seed, "mix order", ids, epoch), kind="stable"))

    def _beta(self, alpha: float, epoch: int, step: int) -> float:
        """From Beta(alpha, alpha), by inverting its distribution function: one hash, one number."""
        from scipy.special import betaincinv  # type: ignore[import-untyped]  # here, since most recipes do without

        return float(betaincinv(alpha, alpha, self._draw("mix share", epoch, step)))

    def _draw(self, field: str, epoch: int, step: int) -> float:
        return float(uniform(self.seed, field, np.array([step], dtype=np.int64), epoch)[0])


def cutmix_box(height: int, width: int, share: float, centre: tuple[float, float]) -> Box:
    """The rectangle that another image fills: of the image's proportions and 1 - share of its area, cut at the border.

    Args:
        height: of the images, in pixels.
        width: likewise.
        share: of the image that stays, before the cut.
        centre: of the rectangle, (row, column) in [0, 1).

    Example:
        >>> cutmix_box(8, 8, 0.75, (0.5, 0.0))  # sides of 4, around row 4 and column 0
        (2, 6, 0, 2)
    """
    side = (1 - share) ** 0.5
    edges = []
    for length, place in ((height, centre[0]), (width, centre[1])):
        middle, half = int(place * length), int(side * length) // 2
        edges += [max(0, middle - half), min(length, middle + half)]
    top, bottom, left, right = edges
    return top, bottom, left, right


def _pasted(images: Tensor, others: Tensor, box: Box) -> tuple[Tensor, float]:
    """Images with the box filled from the others, and the share of each image that stays."""
    top, bottom, left, right = box
    images = images.clone()
    images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()
