"""Data that comes split: bundled data sets, and data from Python."""

from itertools import accumulate
from pathlib import Path

import numpy as np

from potstill.data.decode import Pixels
from potstill.data.doctor.listing import Listing
from potstill.data.images import FileSet, ImageSet, Subset
from potstill.data.listing import Entry
from potstill.data.splits import SPLITS, DataSplits


def list_splits(data: DataSplits) -> Listing:
    """The images of the three splits; as files where they are files of one folder."""
    sets = [data.split(split) for split in SPLITS]
    entries = [
        Entry(name, data.class_names[label], split)
        for split, images in zip(SPLITS, sets, strict=True)
        for name, label in zip(images.names, images.labels.tolist(), strict=True)
    ]
    root, *others = [_root(images) for images in sets]
    if root is None or any(other != root for other in others):
        return Listing(Path(), data.origin, True, data.fingerprint, entries, images=Chained(sets))
    return Listing(root, data.origin, True, data.fingerprint, entries)


class Chained:
    """Several image sets, one after the other."""

    def __init__(self, sets: list[ImageSet]) -> None:
        self.sets = sets
        self.names = tuple(name for images in sets for name in images.names)
        self.labels = np.concatenate([images.labels for images in sets])
        self._ends = np.array(list(accumulate(len(images) for images in sets)))

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3]."""
        at = int(np.searchsorted(self._ends, i, side="right"))
        return self.sets[at].pixels(i - (int(self._ends[at - 1]) if at else 0))


def _root(images: ImageSet) -> Path | None:
    """The folder of a set's files; None where it has none."""
    while isinstance(images, Subset):
        images = images.images
    return images.root if isinstance(images, FileSet) else None
