"""The three splits of a data set, and how they are made where the source has none."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.data.doctor.findings import Finding
from potstill.data.images import ImageSet
from potstill.data.listing import Skipped
from potstill.data.pacing import Admitted
from potstill.data.settings import AugmentSettings
from potstill.data.value_range import Range
from potstill.errors import DataError

SPLITS = ("train", "val", "test")

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """What an epoch shows of training images that are not simply shown once each."""

    length: int  # images per epoch
    groups: Index | None = None  # [N]: each group is equally likely in every draw; None: all images in turn
    curriculum: Admitted | None = None  # of whom an epoch's images are drawn; None: of all


@dataclass(frozen=True)
class DataSplits:
    """Classes and the images of train, val and test."""

    class_names: tuple[str, ...]  # class id -> name
    train: ImageSet
    val: ImageSet
    test: ImageSet
    source: str  # name or path, as it was asked for
    origin: str  # one sentence: where the splits come from
    fingerprint: str  # sha256 over names, content, labels and splits
    augment: AugmentSettings  # the light default of this data
    unlabeled: ImageSet | None = None  # further training images that nobody has labeled
    target: "DataSplits | None" = None  # another domain of the same classes
    draws: Draws | None = None  # what an epoch shows of train; None: each image once
    range: Range | None = None  # by which images of more than 8 bits are read; None: there are none
    skipped: tuple[Skipped, ...] = ()  # left out by data.skip_bad
    doubts: tuple[Finding, ...] = ()  # warnings of the listing: images that are not used
    notes: tuple[str, ...] = ()  # what else is not used

    @property
    def measured(self) -> "DataSplits":
        """The domain in which figures are measured: the target, where there is one."""
        return self if self.target is None else self.target

    @property
    def all_skipped(self) -> tuple[Skipped, ...]:
        """What was left out, of the target too."""
        return (*self.skipped, *(() if self.target is None else self.target.skipped))

    def split(self, name: str) -> ImageSet:
        """The images of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by split and class name."""
        counted = {name: np.bincount(self.split(name).labels, minlength=len(self.class_names)) for name in SPLITS}
        return {name: dict(zip(self.class_names, found.tolist(), strict=True)) for name, found in counted.items()}

    def as_rows(self) -> list[tuple[str, str, str]]:
        """(split, image name, class name) of every image; those of a target are of "target train" and so on."""
        rows = [
            (split, name, self.class_names[label])
            for split in SPLITS
            for name, label in zip(self.split(split).names, self.split(split).labels, strict=True)
        ]
        more = self.target.as_rows() if self.target is not None else []
        return rows + [(f"target {split}", name, class_name) for split, name, class_name in more]


def stratified(
    names: Sequence[str], labels: Index, shares: Mapping[str, float], seed: int, class_names: Sequence[str]
) -> dict[str, Index]:
    """Divide images so that every class has the same share in every part.

    Within a class, images are ordered by SHA-256 of (seed, name): the result does not depend on the order of the
    files, on a random generator's version, or on other classes.

    Args:
        names: [N], distinct.
        labels: [N] class ids.
        shares: part -> share of each class, together below 1; "train" receives the rest.
        seed: another seed gives another split.
        class_names: for messages.

    Returns:
        part -> sorted positions; each part has at least one image of every class.

    Raises:
        DataError: a class with fewer images than parts; says how many are needed.
    """
    if sum(shares.values()) >= 1:
        wanted = " + ".join(f"{part} {share:g}" for part, share in shares.items())
        raise DataError(f"{wanted} leaves no images for train: together they must be below 1")
    counts = np.bincount(labels, minlength=len(class_names))
    needed = len(shares) + 1
    small = [f"{name!r} has {count}" for name, count in zip(class_names, counts, strict=True) if count < needed]
    if small:
        parts = ", ".join(["train", *shares])
        raise DataError(
            f"not enough images for a split into {parts}: every class needs at least {needed}, but "
            + ", ".join(small[:20])
            + (f" and {len(small) - 20} more classes are too small" if len(small) > 20 else "")
        )
    parts_found: dict[str, list[Index]] = {part: [] for part in ("train", *shares)}
    for label in range(len(class_names)):
        members = _in_hash_order(names, np.flatnonzero(labels == label), seed)
        sizes = _part_sizes(len(members), shares)
        start = 0
        for part, size in sizes.items():
            parts_found[part].append(members[start : start + size])
            start += size
        parts_found["train"].append(members[start:])
    return {part: np.sort(np.concatenate(found)) for part, found in parts_found.items()}


def stratified_subset(names: Sequence[str], labels: Index, count: int, seed: int) -> Index:
    """About ``count`` positions, sorted, with the classes' shares kept and at least one image of each class."""
    chosen = []
    for label in np.unique(labels):
        members = _in_hash_order(names, np.flatnonzero(labels == label), seed)
        chosen.append(members[: max(1, round(count * len(members) / len(labels)))])
    return np.sort(np.concatenate(chosen))


def fingerprint(
    parts: Mapping[str, ImageSet], class_names: Sequence[str], contents: Mapping[str, Sequence[str]]
) -> str:
    """SHA-256 of a data set's identity, independent of the order of its files.

    Args:
        parts: split -> images.
        class_names: class id -> name.
        contents: split -> for each image, a word on its content (size and hash).

    Returns:
        64 hex digits.
    """
    lines = sorted(
        "\0".join((split, name, class_names[label], content))
        for split, images in parts.items()
        for name, label, content in zip(images.names, images.labels, contents[split], strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def check_splits(class_names: Sequence[str], parts: Mapping[str, ImageSet], source: str) -> None:
    """Refuse what cannot be trained and evaluated on; all problems in one message.

    Raises:
        DataError: fewer than two classes, or a class without images in a split.
    """
    if len(class_names) < 2:
        found = f"only {class_names[0]!r}" if class_names else "none"
        raise DataError(f"{source}: a classifier needs at least two classes, found {found}")
    problems = []
    for split, images in parts.items():
        counts = np.bincount(images.labels, minlength=len(class_names))
        if len(counts) > len(class_names):
            problems.append(f"{split} has label {len(counts) - 1}, but there are {len(class_names)} classes")
        missing = [repr(name) for name, count in zip(class_names, counts, strict=False) if count == 0]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            problems.append(f"{split} has no images of {', '.join(missing[:10])}{more}")
    if problems:
        raise DataError(f"{source}: every class needs images in train, val and test, but " + "; ".join(problems))


def _part_sizes(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Rounded shares of a class, at least 1 each, that leave at least 1 for train."""
    sizes = {part: max(1, int(count * share + 0.5)) for part, share in shares.items()}
    while sum(sizes.values()) >= count:
        sizes[max(sizes, key=lambda part: sizes[part])] -= 1
    return sizes


def _in_hash_order(names: Sequence[str], members: Index, seed: int) -> Index:
    def key(i: int) -> bytes:
        return hashlib.sha256(f"{seed}/{names[i]}".encode("utf-8", "surrogateescape")).digest()

    return np.array(sorted(members.tolist(), key=key), dtype=np.int64)
