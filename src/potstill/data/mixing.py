"""Mixup and CutMix: each image with another one, and the labels by the same shares.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al.,
"CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
https://arxiv.org/abs/1905.04899.  Student and teacher see the same mixed images (Beyer et al., "Knowledge
distillation: A good teacher is patient and consistent", CVPR 2022, https://arxiv.org/abs/2106.05237).

The papers mix the images of a batch with each other, all by one share.  Here partner, share and kind follow from
(seed, sample id, view) for each image alone, so that a mixed view does not depend on its batch and can be replayed:
the partner is any labeled training image, in its own view of the same number.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.draws import uniform
from potstill.data.orders import ByClass

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]

_UNITS = 2**24  # shares are multiples of one part in so many: 1 - share is exact in float32 then


@dataclass(frozen=True)
class Mixture:
    """How the images of a batch are mixed, one entry for each."""

    partners: Ids  # [B] sample ids
    shares: Numbers  # [B] of the image itself, in [0, 1]
    blends: NDArray[np.bool_]  # [B]: mixup; else CutMix
    boxes: Ids  # [B, 4], what CutMix takes from the partner: top, bottom, left, right


class Mixing:
    """``draw(ids, view)`` says what is mixed and how; ``images`` and ``labels`` do it.

    Args:
        labels: [N] class ids of all labeled training images.
        mixup: alpha of mixup's Beta(alpha, alpha), 0: off.
        cutmix: alpha of CutMix'; where both are on, each image gets one of them, with equal chance.
        classes: K.
        size: S, of the views, in pixels.
        seed: of the draws.
        balanced: each class is equally likely to give the partner; else each image is.
    """

    def __init__(
        self, labels: Ids, *, mixup: float, cutmix: float, classes: int, size: int, seed: int, balanced: bool = False
    ) -> None:
        self.count, self.mixup, self.cutmix = len(labels), mixup, cutmix
        self.classes, self.size, self.seed = classes, size, seed
        self.by_class = ByClass(labels) if balanced else None

    def draw(self, ids: Ids, view: Ids | int) -> Mixture:
        """For samples ``ids`` [B] with view number ``view`` (one for all, or [B])."""

        def drawn(field: str) -> Numbers:
            return uniform(self.seed, f"mix {field}", ids, view)

        if self.by_class is not None:
            partners = self.by_class.choose(drawn("class"), drawn("partner"))
        else:
            partners = (drawn("partner") * self.count).astype(np.int64)
        if self.mixup and self.cutmix:
            blends = drawn("kind") < 0.5
        else:
            blends = np.full(len(ids), self.mixup > 0)
        shares = _beta(np.where(blends, self.mixup, self.cutmix), drawn("share"))
        boxes = cutmix_boxes(self.size, shares, drawn("row"), drawn("column"))
        pasted = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        shares = np.where(blends, np.rint(shares * _UNITS) / _UNITS, 1 - pasted / self.size**2)
        return Mixture(partners, shares, blends, boxes)

    def images(self, own: Tensor, others: Tensor, mixture: Mixture) -> Tensor:
        """Mixed images.

        Args:
            own: [B, 3, S, S], normalised.
            others: likewise, those of the partners.
            mixture: of these samples.
        """
        line = np.arange(self.size)
        top, bottom, left, right = mixture.boxes.T[:, :, None]
        rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
        stays = ~(rows[:, :, None] & columns[:, None, :])
        shares = np.where(mixture.blends[:, None, None], mixture.shares[:, None, None], stays).astype(np.float32)
        share = torch.from_numpy(shares)[:, None].to(own.device, non_blocking=True)
        # Products and sum one after the other, not fused: each is rounded the same way on every device.
        return own * share + others * (1 - share)

    def labels(self, own: Tensor, others: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Labels [B], those of the larger share, and the shares of the classes, [B, K].

        Args:
            own: int64 [B].
            others: likewise, those of the partners.
            mixture: of these samples.
        """
        share = torch.from_numpy(mixture.shares.astype(np.float32)).to(own.device, non_blocking=True)
        soft = _one_hot(own, self.classes) * share[:, None] + _one_hot(others, self.classes) * (1 - share)[:, None]
        return torch.where(share >= 0.5, own, others), soft


def cutmix_boxes(size: int, share: Numbers, row: Numbers, column: Numbers) -> Ids:
    """The squares that another image fills: 1 - share of the image's area, cut at the border.

    Args:
        size: side of the image, in pixels.
        share: [B] of the image that stays, before the cut.
        row: [B] centre of the square, in [0, 1).
        column: likewise.

    Returns:
        int64 [B, 4]: top, bottom, left, right.

    Example:
        >>> cutmix_boxes(8, np.array([0.75]), np.array([0.5]), np.array([0.0]))  # sides of 4, around row 4 and column 0
        array([[2, 6, 0, 2]])
    """
    half = (np.sqrt(1 - share) * size).astype(np.int64) // 2
    middle = (np.stack([row, column]) * size).astype(np.int64)
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half, size)
    return np.stack([first[0], last[0], first[1], last[1]], axis=1)


def _beta(alpha: Numbers, drawn: Numbers) -> Numbers:
    """From Beta(alpha, alpha), by inverting its distribution function: one hash, one number."""
    from scipy.special import betaincinv  # here, since most recipes do without

    found: Numbers = betaincinv(alpha, alpha, drawn)
    return found


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()
