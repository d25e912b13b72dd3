"""Folders and manifests: from their listing to three checked splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from potstill.data.check import check_files
from potstill.data.doctor.division import Division, divide
from potstill.data.doctor.findings import said
from potstill.data.doctor.folder import walk_folder
from potstill.data.doctor.listing import Listing
from potstill.data.doctor.manifest import read_manifest
from potstill.data.images import FileSet, ImageSet, Subset
from potstill.data.listing import refuse
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import SPLITS, DataSplits, check_splits, fingerprint
from potstill.data.value_range import Range, range_of, ranged
from potstill.data.watcher import Watcher

AUGMENT = AugmentSettings(pad_crop=0.1, hflip=True)  # things look alike in a mirror more often than not


def from_folder(settings: DataSettings, root: Path, progress: Watcher | None = None) -> DataSplits:
    """The images of a folder; see ``doctor.folder`` for its forms.  ``progress`` is told how far the check of the files
    is.

    Raises:
        DataError: a listing or files that cannot be trained on.
    """
    return _from_listing(settings, walk_folder(root), progress)


def from_manifest(settings: DataSettings, path: Path, progress: Watcher | None = None) -> DataSplits:
    """The images that a manifest lists.  ``progress`` is told how far the check of the files is.

    Raises:
        DataError: a listing or files that cannot be trained on.
    """
    return _from_listing(settings, read_manifest(path), progress)


def _from_listing(settings: DataSettings, listing: Listing, progress: Watcher | None) -> DataSplits:
    division, findings = divide(listing, settings)
    refuse(settings.source, said([*listing.findings, *findings], listing.root))
    images = FileSet(listing.root, [entry.name for entry in listing.entries], division.labels)
    contents = check_files(listing.root, images.names, settings.source, progress=progress)
    images.expect(contents)
    parts = parts_of(images, division)
    images.range = range_of(parts["train"].names, contents, settings.range)
    check_splits(division.class_names, parts, settings.source)
    return DataSplits(
        division.class_names, parts["train"], parts["val"], parts["test"], source=settings.source,
        origin=division.origin, augment=AUGMENT, range=images.range,
        fingerprint=fingerprint_of(parts, division.class_names, contents, settings.range),
    )  # fmt: skip


def parts_of(images: ImageSet, division: Division) -> dict[str, ImageSet]:
    """Split -> its images."""
    return {split: Subset(images, np.flatnonzero(division.splits == i)) for i, split in enumerate(SPLITS)}


def fingerprint_of(
    parts: Mapping[str, ImageSet],
    class_names: Sequence[str],
    contents: Mapping[str, str],
    wanted: Range | Literal["auto"],
) -> str:
    """``splits.fingerprint``, where ``contents`` are by name; the range counts."""
    words = {split: [contents[name] for name in part.names] for split, part in parts.items()}
    return ranged(fingerprint(parts, class_names, words), range_of(parts["train"].names, contents, wanted))
