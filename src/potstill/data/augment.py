"""Augmentation of whole batches: views of images, colour jitter, RandAugment, TrivialAugment, mixup and CutMix.

A view is a pure function of (seed, sample id, view number), so that a teacher's output for it can be cached and the
view reproduced exactly.  Order: crop, shift, flips, rotation, colour jitter, policy, erasing.

Colour jitter follows torchvision's formulas, all of the form ``factor * pixels + offset``; factors are multiples of
2**-10, so that hardly anything is rounded and views are the same on every device.

RandAugment and TrivialAugment call torchvision's operations, once for all images that get the same one: Cubuk et al.,
"RandAugment", NeurIPS 2020, https://arxiv.org/abs/1909.13719; Müller and Hutter, "TrivialAugment: Tuning-free Yet
State-of-the-Art Data Augmentation", ICCV 2021, https://arxiv.org/abs/2103.10158.

Mixup and CutMix combine each image with another one, and the labels with the same weights: Zhang et al., "mixup: Beyond
Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al., "CutMix: Regularization Strategy
to Train Strong Classifiers with Localizable Features", ICCV 2019, https://arxiv.org/abs/1905.04899.  Student and
teacher see the same mixed images (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent",
CVPR 2022, https://arxiv.org/abs/2106.05237).  The papers mix the images of a batch with each other, with one weight.
Here partner, weight and kind follow from (seed, sample id, view) for each image alone, so that a mixed view does not
depend on its batch and can be reproduced: the partner is any labeled training image, in its view of the same number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.samplers import ClassIndex, CounterRNG, derive_seed, uniform
from potstill.data.settings import AugmentSettings
from potstill.data.transforms import (
    CROP_RATIO,
    ViewSize,
    batch_slices,
    center_crop,
    draw_grid,
    random_erase,
    resized_crops,
    sample_boxes,
    sample_grid,
    scale_boxes,
    to_device,
)
from potstill.types import widest_float

_STEPS = 2**10
_CONTRAST, _SATURATION = 1, 2  # 0: brightness
_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def color_jitter(images: Tensor, strength: float, draws: CounterRNG) -> Tensor:
    """Change brightness, contrast and saturation of uint8 [B, 3, S, S] by up to ``strength``, in random order."""
    uniforms = np.stack([draws(f"jitter {name}") for name in ("brightness", "contrast", "saturation")], axis=1)
    factors = np.rint((1 - strength + 2 * strength * uniforms) * _STEPS) / _STEPS
    orders = _ORDERS[(draws("jitter order") * len(_ORDERS)).astype(np.int64)]
    return adjust_colors(images, np.take_along_axis(factors, orders, axis=1), orders)


def adjust_colors(images: Tensor, factors: NDArray[np.float64], orders: NDArray[np.int64]) -> Tensor:
    """Apply an operation (0 brightness, 1 contrast, 2 saturation) to each image in each round; ``factors`` and
    ``orders`` are [B, rounds], the factors multiples of 2**-10; pixels are rounded down after each round.
    """
    rounds = to_device(torch.from_numpy(np.stack([factors, orders]).astype(np.float32)), images.device)
    adjusted = torch.empty_like(images, memory_format=torch.contiguous_format)
    for chosen in batch_slices(images):
        some = images[chosen].to(torch.float32, memory_format=torch.contiguous_format)
        for factor, operation in rounds[:, chosen, :, None, None, None].unbind(2):
            _adjust_round(some, factor, operation)
        adjusted[chosen] = some.to(torch.int16)  # converting to uint8 is faster from int16
    return adjusted


def _adjust_round(images: Tensor, factor: Tensor, operation: Tensor) -> None:
    grey, rest = _grey(images), 1 - factor
    rows = grey.sum(dim=3, keepdim=True)  # integers: exact in any order of summation, in float32 and float64
    total = rows.sum(dim=2, keepdim=True, dtype=widest_float(images.device))
    mean = total / torch.full_like(
        total, grey[0].numel()
    )  # some devices round a division by a Python number differently
    offset = torch.where(operation == _CONTRAST, rest * mean, 0).float()
    grey.mul_(torch.where(operation == _SATURATION, rest, 0)).add_(offset)
    images.mul_(factor).add_(grey).clamp_(0, 255).floor_()


def _grey(images: Tensor) -> Tensor:
    """Return 0.2989 R + 0.587 G + 0.114 B, rounded down, [B, 1, S, S]."""
    red, green, blue = images.unbind(1)
    weighted = torch.mul(red, 2989).add_(green, alpha=5870).add_(blue, alpha=1140)
    # The offset keeps values away from integers, where rounding down would depend on the last bit.
    return weighted.add_(0.5).mul_(1e-4).floor_()[:, None]


Operation = Callable[[Tensor, float], Tensor]  # uint8 [B, 3, S, S] and a magnitude -> the same shape and type

_BINS = 31  # number of magnitudes
_TRANSLATIONS = {"TranslateX", "TranslateY"}  # their magnitude is a number of pixels
_SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}


@dataclass(frozen=True)
class AugmentPolicy:
    """``policy(images, draws)`` applies ``count`` of torchvision's operations to each image."""

    field: str  # prefix of the random numbers' fields
    count: int = 1
    magnitude: int | None = None  # bin of 31; None: drawn for each operation
    space: Literal["randaugment", "trivialaugment"] = "randaugment"

    def __call__(self, images: Tensor, draws: CounterRNG, drawn_size: int | None = None) -> Tensor:
        """Return uint8 [B, 3, S, S], as ``images``; translations are drawn in pixels of ``drawn_size`` (None: S)."""
        size, operations = images.shape[-1], _operations()
        names, largest = list(operations), _magnitudes(self.space, drawn_size or size)
        images = images.clone()
        for number in range(self.count):
            chosen = (draws(f"{self.field} operation {number}") * len(names)).astype(np.int64)
            bins = np.full(len(draws), self.magnitude)
            if self.magnitude is None:
                bins = (draws(f"{self.field} magnitude {number}") * _BINS).astype(np.int64)
            signs = draws(f"{self.field} sign {number}") < 0.5
            keys, group = np.unique(np.stack([chosen, bins, signs], axis=1), axis=0, return_inverse=True)
            for position, (operation, level, negative) in enumerate(keys.tolist()):
                name = names[operation]
                magnitude = largest[name](level) if name in largest else 0.0
                if negative and name in _SIGNED:
                    magnitude = -magnitude
                if name in _TRANSLATIONS:
                    magnitude = round(int(magnitude) * size / (drawn_size or size))
                index = to_device(torch.from_numpy(np.flatnonzero(group.reshape(-1) == position)), images.device)
                images[index] = operations[name](images[index], magnitude)
        return images


POLICIES = {
    "randaugment": AugmentPolicy("randaugment", count=2, magnitude=9),
    "trivialaugment": AugmentPolicy("trivialaugment", space="trivialaugment"),
}
STRONG_POLICY = AugmentPolicy("strong", count=2, magnitude=10)  # the transform of MLLD and CRLD


def _magnitudes(space: str, size: int) -> dict[str, Callable[[int], float]]:
    """Return the magnitude by bin of each operation that has one."""
    wide = space == "trivialaugment"

    def linear(largest: float) -> Callable[[int], float]:
        return torch.linspace(0.0, largest, _BINS).tolist().__getitem__

    tone, shift = linear(0.99 if wide else 0.9), linear(32.0 if wide else 150.0 / 331.0 * size)
    bits = (8 - torch.arange(_BINS) / ((_BINS - 1) / (6 if wide else 4))).round().tolist()
    return {
        **dict.fromkeys(("ShearX", "ShearY"), linear(0.99 if wide else 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), shift),
        "Rotate": linear(135.0 if wide else 30.0),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), tone),
        "Posterize": bits.__getitem__,
        "Solarize": torch.linspace(1.0, 0.0, _BINS).tolist().__getitem__,
    }


def _operations() -> dict[str, Operation]:
    from torchvision.transforms.v2 import functional as F  # slow to import, and rarely needed

    def affine(images: Tensor, *, shear: list[float], translate: list[int], centre: list[float] | None) -> Tensor:
        moved: Tensor = F.affine(images, 0.0, translate, 1.0, shear, center=centre)
        return moved

    def degrees(magnitude: float) -> float:
        return math.degrees(math.atan(magnitude))

    return {
        "Identity": lambda images, _: images,
        "ShearX": lambda images, m: affine(images, shear=[degrees(m), 0.0], translate=[0, 0], centre=[0, 0]),
        "ShearY": lambda images, m: affine(images, shear=[0.0, degrees(m)], translate=[0, 0], centre=[0, 0]),
        "TranslateX": lambda images, m: affine(images, shear=[0.0, 0.0], translate=[int(m), 0], centre=None),
        "TranslateY": lambda images, m: affine(images, shear=[0.0, 0.0], translate=[0, int(m)], centre=None),
        "Rotate": F.rotate,
        "Brightness": lambda images, m: F.adjust_brightness(images, 1 + m),
        "Color": lambda images, m: F.adjust_saturation(images, 1 + m),
        "Contrast": lambda images, m: F.adjust_contrast(images, 1 + m),
        "Sharpness": lambda images, m: F.adjust_sharpness(images, 1 + m),
        "Posterize": lambda images, m: F.posterize(images, int(m)),
        "Solarize": lambda images, m: F.solarize(images, 255 * m),
        "AutoContrast": lambda images, _: F.autocontrast(images),
        "Equalize": lambda images, _: F.equalize(images),
    }


Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


class ViewTransform:
    """Augmentation of a batch of squares, uint8 [B, 3, R, R], to views, uint8 [B, 3, size, size].

    Random crops of stretched images divide the ratio that they draw by that of the image, so that shapes survive.

    Args:
        augment: settings of the augmentation.
        size: side of a view, in pixels; at most R.
        seed: of the random numbers.
        strong: the second view of MLLD and CRLD: other random numbers, followed by RandAugment(2, 10).
        drawn: sizes in whose pixels boxes and shifts are drawn; None: R and ``size``.
    """

    def __init__(
        self,
        augment: AugmentSettings,
        *,
        size: int,
        seed: int,
        strong: bool = False,
        drawn: ViewSize | None = None,
    ) -> None:
        self.augment, self.size, self.drawn = augment, size, drawn
        self.seed = derive_seed(seed, "strong") if strong else seed
        self.policies = [POLICIES[augment.auto_augment]] if augment.auto_augment != "none" else []
        if strong:
            self.policies.append(STRONG_POLICY)
        self.moves_pixels = augment.pad_crop > 0 or augment.hflip or augment.vflip or augment.rotate90

    def __call__(self, squares: Tensor, ids: Ids, view: Ids | int, aspects: Numbers | None = None) -> Tensor:
        """Return the views; ``aspects`` [B] are width / height of images that were stretched to the squares."""
        draws = CounterRNG(self.seed, ids, view)
        drawn = self.drawn or ViewSize(squares.shape[-1], self.size)
        images = self._crop_and_move(squares, draws, drawn, aspects)
        if self.augment.color_jitter:
            images = color_jitter(images, self.augment.color_jitter, draws)
        for policy in self.policies:
            images = policy(images, draws, drawn.size)
        if self.augment.erasing:
            images = random_erase(images, self.augment.erasing, draws, drawn.size)
        return images

    def _crop_and_move(self, squares: Tensor, draws: CounterRNG, drawn: ViewSize, aspects: Numbers | None) -> Tensor:
        scale = self.augment.crop_scale
        if scale is None and not self.moves_pixels:
            return center_crop(squares, self.size)
        grid = draw_grid(self.augment, self.size, draws, squares.device, drawn.size)
        if scale is None:
            return sample_grid(squares, grid)
        boxes, _ = sample_boxes(scale, CROP_RATIO, drawn.side, draws, "crop", aspects)
        return resized_crops(squares, scale_boxes(boxes, drawn.side, squares.shape[-1]), grid)


_UNITS = 2**24  # weights are multiples of 1 / _UNITS, so that 1 - weight is exact in float32


@dataclass(frozen=True)
class MixParams:
    """How each image of a batch is mixed."""

    partners: Ids  # [B] sample ids
    weights: Numbers  # [B] of the image itself, in [0, 1]
    is_mixup: NDArray[np.bool_]  # [B]; else CutMix
    boxes: Ids  # [B, 4], the part that CutMix takes from the partner: top, bottom, left, right


class BatchMixer:
    """Mixup and CutMix: ``draw`` the parameters, then mix ``images`` and ``labels``.

    Args:
        labels: [N] class ids of all labeled training images.
        mixup: alpha of mixup's Beta(alpha, alpha), 0: off.
        cutmix: alpha of CutMix, 0: off; if both are on, each image gets one of them with probability 1/2.
        classes: K.
        size: S, of the views in whose pixels CutMix's boxes are drawn.
        seed: of the random numbers.
        balanced: the partner's class is drawn uniformly; else the partner is.
        unlabeled: number of further images without labels, with ids from N on; they are mixed with each other.
    """

    def __init__(
        self,
        labels: Ids,
        *,
        mixup: float,
        cutmix: float,
        classes: int,
        size: int,
        seed: int,
        balanced: bool = False,
        unlabeled: int = 0,
    ) -> None:
        self.unlabeled = unlabeled
        self.count, self.mixup, self.cutmix = len(labels), mixup, cutmix
        self.classes, self.size, self.seed = classes, size, seed
        self.by_class = ClassIndex(labels) if balanced else None

    def draw(self, ids: Ids, view: Ids | int) -> MixParams:
        """Return the parameters for samples ``ids`` [B] with view number ``view`` (one for all, or [B])."""

        def drawn(field: str) -> Numbers:
            return uniform(self.seed, f"mix {field}", ids, view)

        if self.by_class is not None:
            partners = self.by_class.sample(drawn("class"), drawn("partner"))
        else:
            partners = (drawn("partner") * self.count).astype(np.int64)
        if self.unlabeled:
            others = self.count + (drawn("partner") * self.unlabeled).astype(np.int64)
            partners = np.where(ids < self.count, partners, others)
        if self.mixup and self.cutmix:
            is_mixup = drawn("kind") < 0.5
        else:
            is_mixup = np.full(len(ids), self.mixup > 0)
        weights = _beta(np.where(is_mixup, self.mixup, self.cutmix), drawn("share"))
        boxes = cutmix_boxes(self.size, weights, drawn("row"), drawn("column"))
        pasted = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        weights = np.where(is_mixup, np.rint(weights * _UNITS) / _UNITS, 1 - pasted / self.size**2)
        return MixParams(partners, weights, is_mixup, boxes)

    def images(self, own: Tensor, others: Tensor, params: MixParams) -> Tensor:
        """Return the mixed images, normalised [B, 3, H, H]; H may differ from S."""
        size, device = own.shape[-1], own.device
        line = torch.arange(size, device=device)
        # A few numbers per image are copied to the device, on which the masks [B, 1, S, S] are computed.
        boxes = np.rint(params.boxes * size / self.size).astype(np.int64)
        top, bottom, left, right = to_device(torch.from_numpy(boxes), device).T[:, :, None]
        rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
        outside = ~(rows[:, :, None] & columns[:, None, :])
        share = to_device(torch.from_numpy(params.weights.astype(np.float32)), device)[:, None, None]
        is_mixup = to_device(torch.from_numpy(params.is_mixup), device)[:, None, None]
        weight = torch.where(is_mixup, share, outside.float())[:, None]
        # Not fused, so that each product and sum is rounded in the same way on every device.
        return own * weight + others * (1 - weight)

    def answers(self, own: Tensor, others: Tensor, params: MixParams, *, linear: bool = False) -> Tensor:
        """Return logits [B, K, 1, 1] whose probabilities are mixed as the images; embeddings are mixed themselves."""
        weight = to_device(torch.from_numpy(params.weights.astype(np.float32)), own.device)
        weight = weight[:, None, None, None]
        if linear:
            return own * weight + others * (1 - weight)
        return torch.logaddexp(own.log_softmax(1) + weight.log(), others.log_softmax(1) + (1 - weight).log())

    def labels(self, own: Tensor, others: Tensor, params: MixParams) -> tuple[Tensor, Tensor]:
        """Return the labels of the larger weight, int64 [B], and the soft labels [B, K]: rows of 0 if unlabeled."""
        weight = to_device(torch.from_numpy(params.weights.astype(np.float32)), own.device)
        soft = _one_hot(own, self.classes) * weight[:, None] + _one_hot(others, self.classes) * (1 - weight)[:, None]
        return torch.where(weight >= 0.5, own, others), soft


def cutmix_boxes(size: int, weight: Numbers, row: Numbers, column: Numbers) -> Ids:
    """Return squares of a share ``1 - weight`` of the image's area, clipped at the border: int64 [B, 4] of top, bottom,
    left, right.  ``row`` and ``column`` of the centres are in [0, 1).

    Example:
        >>> cutmix_boxes(8, np.array([0.75]), np.array([0.5]), np.array([0.0]))  # sides of 4, around row 4 and column 0
        array([[2, 6, 0, 2]])
    """
    half = (np.sqrt(1 - weight) * size).astype(np.int64) // 2
    middle = (np.stack([row, column]) * size).astype(np.int64)
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half, size)
    return np.stack([first[0], last[0], first[1], last[1]], axis=1)


def _beta(alpha: Numbers, drawn: Numbers) -> Numbers:
    """Return samples of Beta(alpha, alpha) by the inverse of its distribution function."""
    from scipy.special import betaincinv  # slow to import, and rarely needed

    samples: Numbers = betaincinv(alpha, alpha, drawn)
    return samples


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels.clamp(min=0), classes).float() * (labels >= 0)[:, None]
