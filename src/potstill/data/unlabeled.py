"""Images without labels: a second folder, whose images only the teacher says something about."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from potstill.data.check import check_files
from potstill.data.decode import Pixels
from potstill.data.images import FileSet, ImageSet, Subset
from potstill.data.relabelled import Relabelled
from potstill.data.settings import DataSettings
from potstill.data.sources import as_skipped, bad_files, list_images
from potstill.data.splits import DataSplits
from potstill.data.watcher import Watcher
from potstill.errors import DataError, UsageError

NO_LABEL = -100  # `potstill.types.UNLABELED`, which lies beside torch


class UnlabeledFiles(FileSet):
    """Image files below a folder, of no class.

    Args:
        root: the folder.
        names: [N] paths relative to ``root``, with forward slashes.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        super().__init__(root, names, np.zeros(len(names), dtype=np.int64))
        self.labels = np.full(len(names), NO_LABEL, dtype=np.int64)


class Joined:
    """Labeled images, then unlabeled ones, as one set; whatever labels the latter have do not count."""

    def __init__(self, labeled: ImageSet, unlabeled: ImageSet) -> None:
        self.labeled, self.unlabeled = labeled, unlabeled
        self.names = (*labeled.names, *unlabeled.names)
        self.labels = np.concatenate([labeled.labels, np.full(len(unlabeled), NO_LABEL, dtype=np.int64)])

    @property
    def parts(self) -> tuple[ImageSet, ImageSet]:
        """The two sets."""
        return self.labeled, self.unlabeled

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3]; those without labels follow the others."""
        own = len(self.labeled)
        return self.labeled.pixels(i) if i < own else self.unlabeled.pixels(i - own)


def check_unlabeled(settings: DataSettings) -> None:
    """Whether the folder is there, without reading an image.

    Raises:
        UsageError: it is not.
    """
    if settings.unlabeled is not None and not Path(settings.unlabeled).expanduser().is_dir():
        raise UsageError(f"data.unlabeled: no folder {settings.unlabeled!r}; name one with images, at any depth")


def with_unlabeled(settings: DataSettings, data: DataSplits, progress: Watcher | None = None) -> DataSplits:
    """The data with the images of ``settings.unlabeled``; as it is where none are asked for.  ``progress`` is told
    how far the check of the files is.

    Raises:
        UsageError: no such folder; or the data has unlabeled images already.
        DataError: no images, files that are none, or images of val or test among them.
    """
    if settings.unlabeled is None:
        return data
    if data.unlabeled is not None:
        raise UsageError("unlabeled images come from data.unlabeled or with the data from Python, not from both")
    check_unlabeled(settings)
    root = Path(settings.unlabeled).expanduser()
    names, skipped = list_images(root, settings)
    bad: dict[str, str] | None = {} if settings.skip_bad else None
    _refuse_seen(UnlabeledFiles(root, names), data)
    contents = check_files(root, names, str(root), progress=progress, bad=bad)
    if bad:
        names = [name for name in names if name not in bad]
        skipped += bad_files(root, bad)
    if not names:
        raise DataError(f"{root}: no unlabeled image is left: {len(skipped):,} files cannot be read")
    found = UnlabeledFiles(root, names)
    found.expect(contents)
    found.range = data.range
    return replace(
        data,
        unlabeled=found,
        origin=f"{data.origin}; {len(found):,} unlabeled from {settings.unlabeled}",
        fingerprint=_fingerprint(data.fingerprint, contents),
        skipped=(*data.skipped, *as_skipped([replace(each, path=str(root / each.path)) for each in skipped])),
    )


def _refuse_seen(found: UnlabeledFiles, data: DataSplits) -> None:
    """The teacher's answers on val and test images would be learned, and then measured on the same images."""
    unlabeled = {path.resolve() for path in paths_of(found)}
    for split in ("val", "test"):
        if seen := sorted(unlabeled.intersection(path.resolve() for path in paths_of(data.split(split)))):
            raise DataError(
                f"{found.root}: {len(seen)} of the unlabeled images are images of {split}, for example {seen[0]}.\n"
                "Figures on images that were trained on say nothing; name a folder without them"
            )


def paths_of(images: ImageSet) -> list[Path]:
    """Files of a set, as far as it consists of files."""
    if isinstance(images, Relabelled):
        return paths_of(images.images)
    if isinstance(images, Subset):
        inner = paths_of(images.images)
        return [inner[i] for i in images.index] if inner else []
    return [images.root / name for name in images.names] if isinstance(images, FileSet) else []


def _fingerprint(labeled: str, contents: dict[str, str]) -> str:
    lines = [labeled, *sorted(f"{name}\0{content}" for name, content in contents.items())]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
