"""Digits: 1,797 handwritten digits of 8x8 pixels, which come with scikit-learn (UCI, CC BY 4.0)."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.data.builtin import digest_pixels
from potstill.data.image_sets import ArraySet
from potstill.data.settings import AugmentSettings, DataSettings, Options, read_options
from potstill.data.splits import DataSplits, fingerprint, split_by_settings

_FILE = Path("datasets", "data", "digits.csv.gz")

AUGMENT = AugmentSettings(pad_crop=0.1)  # a mirrored 2 is no 2


class DigitsOptions(Options):
    """No options."""


def digits(settings: DataSettings) -> DataSplits:
    """Return the ten digits, split by the settings."""
    read_options(settings, DigitsOptions)
    counts, labels = read_counts()
    pixels = np.rint(counts * (255 / 16)).astype(np.uint8)
    images = ArraySet(pixels, labels, [f"digits/{i:05d}" for i in range(len(pixels))])
    class_names = tuple(str(digit) for digit in range(10))
    parts, origin = split_by_settings(settings, images, class_names)
    return DataSplits(
        class_names, parts["train"], parts["val"], parts["test"], source=settings.source, origin=origin,
        fingerprint=fingerprint(parts, class_names, digest_pixels(parts)), augment=AUGMENT,
    )  # fmt: skip


def check(settings: DataSettings) -> None:
    """Check that there are no options."""
    read_options(settings, DigitsOptions)


def read_counts() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of set bits in each 4x4 block, [N, 8, 8], and labels [N], without importing scikit-learn."""
    found = importlib.util.find_spec("sklearn")
    file = Path(found.origin).parent / _FILE if found is not None and found.origin is not None else None
    if file is None or not file.is_file():
        from sklearn.datasets import load_digits

        loaded = load_digits()
        return loaded.images.astype(np.int64), loaded.target.astype(np.int64)
    with gzip.open(file, "rt", encoding="ascii") as lines:
        rows = np.array([line.split(",") for line in lines], dtype=np.int64)
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
