"""Folders and manifests: from their listing to three checked splits."""

from pathlib import Path

import numpy as np

from potstill.data.check import check_files
from potstill.data.folders import list_folder
from potstill.data.images import FileSet, ImageSet, Subset
from potstill.data.listing import Entry
from potstill.data.manifest import list_manifest
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import SPLITS, DataSplits, check_splits, fingerprint, stratified
from potstill.data.watcher import Watcher

AUGMENT = AugmentSettings(pad_crop=0.1, hflip=True)  # things look alike in a mirror more often than not


def from_folder(settings: DataSettings, root: Path, progress: Watcher | None = None) -> DataSplits:
    """The images of a folder; see ``folders`` for its forms.  ``progress`` is told how far the check of the files is.

    Raises:
        DataError: a listing or files that cannot be trained on.
    """
    return _from_listing(settings, root, list_folder(root), "folders", progress)


def from_manifest(settings: DataSettings, path: Path, progress: Watcher | None = None) -> DataSplits:
    """The images that a manifest lists.  ``progress`` is told how far the check of the files is.

    Raises:
        DataError: a listing or files that cannot be trained on.
    """
    return _from_listing(settings, path.parent, list_manifest(path), "manifest", progress)


def _from_listing(
    settings: DataSettings, root: Path, entries: list[Entry], kind: str, progress: Watcher | None
) -> DataSplits:
    class_names = tuple(sorted({entry.label for entry in entries}))
    ids = {name: i for i, name in enumerate(class_names)}
    labels = np.array([ids[entry.label] for entry in entries], dtype=np.int64)
    images = FileSet(root, [entry.name for entry in entries], labels)
    if len(class_names) < 2:
        check_splits(class_names, {}, settings.source)
    parts, origin = _divide(settings, images, entries, class_names, kind)
    check_splits(class_names, parts, settings.source)
    contents = check_files(root, images.names, settings.source, progress=progress)
    images.expect(contents)
    found = {split: [contents[name] for name in part.names] for split, part in parts.items()}
    return DataSplits(
        class_names, parts["train"], parts["val"], parts["test"], source=settings.source, origin=origin,
        fingerprint=fingerprint(parts, class_names, found), augment=AUGMENT,
    )  # fmt: skip


def _divide(
    settings: DataSettings, images: FileSet, entries: list[Entry], class_names: tuple[str, ...], kind: str
) -> tuple[dict[str, ImageSet], str]:
    """Splits as the source gives them; what it lacks is split off from train, or from the whole pile."""
    places = {split: np.flatnonzero([entry.split == split for entry in entries]) for split in SPLITS}
    given = {split: index for split, index in places.items() if len(index)}
    shares = {s: share for s, share in (("val", settings.val), ("test", settings.test)) if s not in given}
    if not shares:
        return {split: Subset(images, given[split]) for split in SPLITS}, f"{kind} train, val, test"
    pool = given.get("train", np.arange(len(entries)))
    made = stratified([images.names[i] for i in pool], images.labels[pool], shares, settings.split_seed, class_names)
    index = given | {part: pool[positions] for part, positions in made.items()}
    left = 1 - sum(shares.values())
    if given:
        taken = " and ".join(f"{s} ({100 * share:g} %)" for s, share in shares.items())
        how = f"{kind} {', '.join(given)}; {taken} split from train here, stratified"
    else:
        how = "made here: stratified " + "/".join(f"{100 * share:g}" for share in (left, *shares.values()))
    return {split: Subset(images, index[split]) for split in SPLITS}, f"{how}, split seed {settings.split_seed}"
