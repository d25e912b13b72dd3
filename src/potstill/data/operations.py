"""RandAugment and TrivialAugment: torchvision's operations, for all images at once that get the same one.

Cubuk et al., "RandAugment", NeurIPS 2020, https://arxiv.org/abs/1909.13719; Müller and Hutter, "TrivialAugment:
Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021, https://arxiv.org/abs/2103.10158.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from potstill.data.draws import Draws

Operation = Callable[[Tensor, float], Tensor]  # uint8 [B, 3, S, S] and a magnitude -> the same shape and type

_BINS = 31  # of magnitudes
_SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}


@dataclass(frozen=True)
class Policy:
    """``policy(images, draws)`` applies ``count`` operations to each image, each equally likely.

    Magnitudes and operations are those of torchvision's ``v2.RandAugment`` and ``v2.TrivialAugmentWide``.
    """

    field: str  # of the draws
    count: int = 1
    magnitude: int | None = None  # bin of 31; None: drawn for each operation
    space: Literal["randaugment", "trivialaugment"] = "randaugment"

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, 3, S, S] -> the same shape and type."""
        operations = _operations()
        names, largest = list(operations), _magnitudes(self.space, images.shape[-1])
        images = images.clone()
        for number in range(self.count):
            chosen = (draws(f"{self.field} operation {number}") * len(names)).astype(np.int64)
            bins = np.full(len(draws), self.magnitude)
            if self.magnitude is None:
                bins = (draws(f"{self.field} magnitude {number}") * _BINS).astype(np.int64)
            signs = draws(f"{self.field} sign {number}") < 0.5
            keys, group = np.unique(np.stack([chosen, bins, signs], axis=1), axis=0, return_inverse=True)
            for place, (operation, level, negative) in enumerate(keys.tolist()):
                name = names[operation]
                magnitude = largest[name](level) if name in largest else 0.0
                if negative and name in _SIGNED:
                    magnitude = -magnitude
                index = torch.from_numpy(np.flatnonzero(group.reshape(-1) == place)).to(images.device)
                images[index] = operations[name](images[index], magnitude)
        return images


POLICIES = {
    "randaugment": Policy("randaugment", count=2, magnitude=9),
    "trivialaugment": Policy("trivialaugment", space="trivialaugment"),
}
STRONG = Policy("strong", count=2, magnitude=10)  # MLLD's and CRLD's transform


def _magnitudes(space: str, size: int) -> dict[str, Callable[[int], float]]:
    """Of each operation, by bin; those that have none are left out."""
    wide = space == "trivialaugment"

    def rising(largest: float) -> Callable[[int], float]:
        return torch.linspace(0.0, largest, _BINS).tolist().__getitem__

    tone, shift = rising(0.99 if wide else 0.9), rising(32.0 if wide else 150.0 / 331.0 * size)
    bits = (8 - torch.arange(_BINS) / ((_BINS - 1) / (6 if wide else 4))).round().tolist()
    return {
        **dict.fromkeys(("ShearX", "ShearY"), rising(0.99 if wide else 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), shift),
        "Rotate": rising(135.0 if wide else 30.0),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), tone),
        "Posterize": bits.__getitem__,
        "Solarize": torch.linspace(1.0, 0.0, _BINS).tolist().__getitem__,
    }


def _operations() -> dict[str, Operation]:
    """By torchvision's names, in its order."""
    from torchvision.transforms.v2 import functional as F  # slow to import, and most recipes do without

    def affine(images: Tensor, *, shear: list[float], translate: list[int], centre: list[float] | None) -> Tensor:
        found: Tensor = F.affine(images, 0.0, translate, 1.0, shear, center=centre)
        return found

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
