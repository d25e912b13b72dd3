"""Digits: 1,797 handwritten digits of 8x8 pixels, which come with scikit-learn (UCI, CC BY 4.0)."""

import hashlib

import numpy as np

from potstill.data.bundled.made_splits import made_here
from potstill.data.bundled.options import Options, read_options
from potstill.data.images import ArraySet
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import DataSplits, fingerprint

AUGMENT = AugmentSettings(pad_crop=0.1)  # a mirrored 2 is no 2


class DigitsOptions(Options):
    """Digits has none."""


def digits(settings: DataSettings) -> DataSplits:
    """The ten digits, split here.

    Raises:
        UsageError: options; it has none.
    """
    read_options(settings, DigitsOptions)
    from sklearn.datasets import load_digits

    found = load_digits()
    # Pixels are counts from 0 to 16 of set bits in 4x4 blocks.
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = ArraySet(pixels, found.target, [f"digits/{i:05d}" for i in range(len(pixels))])
    class_names = tuple(str(name) for name in found.target_names)
    parts, origin = made_here(settings, images, class_names)
    contents = {split: [_digest(part.pixels(i)) for i in range(len(part))] for split, part in parts.items()}
    return DataSplits(
        class_names, **parts, source=settings.source, origin=origin,
        fingerprint=fingerprint(parts, class_names, contents), augment=AUGMENT,
    )  # fmt: skip


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
