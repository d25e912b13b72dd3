"""The train, val and test splits of a data set: how they are made, their fingerprint, and checks of their classes."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from potstill.data.entries import Finding, Listing, SkippedFile
from potstill.data.image_io import ValueRange
from potstill.data.image_sets import ConcatenatedSet, ImageSet, Subset, file_digests, short_digests
from potstill.data.samplers import Curriculum
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.errors import DataError, UsageError
from potstill.formatting import format_names

SPLITS = ("train", "val", "test")

Index = NDArray[np.int64]
SplitRow = tuple[str, str, str, str]  # split, image name, class name, content


@dataclass(frozen=True)
class EpochSampling:
    """The training images of an epoch, if they are not simply each image once."""

    length: int  # images per epoch
    groups: Index | None = None  # [N]; each group is equally likely in every draw; None: permutations
    curriculum: Curriculum | None = None  # the images that an epoch uses; None: all


@dataclass(frozen=True)
class ImagePool:
    """All images of a data set, whatever their splits were."""

    images: ImageSet
    fingerprint: str  # of the data with its own splits


# Of images without labels whose teacher names no classes either: networks have a head of two outputs, always 0.
NO_CLASSES = ("no class 1", "no class 2")


@dataclass(frozen=True)
class DataSplits:
    """Classes and the images of train, val and test."""

    class_names: tuple[str, ...]  # class id -> name; NO_CLASSES: there are none
    train: ImageSet
    val: ImageSet
    test: ImageSet
    source: str  # name or path, as given
    origin: str  # one sentence: where the splits come from
    fingerprint: str  # sha256 over names, content, labels and splits
    augment: AugmentSettings  # default augmentation of this data
    unlabeled: ImageSet | None = None  # further training images, without labels
    target: "DataSplits | None" = None  # another domain of the same classes
    draws: EpochSampling | None = None  # training images of an epoch; None: each once
    teacher_labels: tuple[str, ...] = ()  # splits without labels: those in use are the teacher's predictions, or -100
    range: ValueRange | None = None  # of images of more than 8 bits; None: there are none
    skipped: tuple[SkippedFile, ...] = ()  # left out by data.skip_bad
    doubts: tuple[Finding, ...] = ()  # warnings of the listing: images that are not used
    notes: tuple[str, ...] = ()  # remarks on what else is not used
    pool: "ImagePool | None" = None  # of the folds of a cross-validation, from which all splits are selected

    @property
    def measured(self) -> "DataSplits":
        """The domain of the metrics: the target if there is one."""
        return self if self.target is None else self.target

    @property
    def has_classes(self) -> bool:
        """Whether labels or a teacher name classes."""
        return self.class_names != NO_CLASSES

    @property
    def all_skipped(self) -> tuple[SkippedFile, ...]:
        """Files that were left out, including the target's."""
        return (*self.skipped, *(() if self.target is None else self.target.skipped))

    def split(self, name: str) -> ImageSet:
        """Return the images of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of images by split and class name; of images without classes, under "images"."""
        if not self.has_classes:
            return {name: {"images": len(self.split(name))} for name in SPLITS}
        known = {name: np.asarray(self.split(name).labels) for name in SPLITS}
        counted = {name: np.bincount(ids[ids >= 0], minlength=len(self.class_names)) for name, ids in known.items()}
        return {name: dict(zip(self.class_names, found.tolist(), strict=True)) for name, found in counted.items()}

    def as_rows(self) -> list[SplitRow]:
        """Return (split, image name, class name, content) of every image, "target train" and so on for the target.

        Contents are as of ``short_digests``.
        """
        rows = [
            (split, name, "" if split in self.teacher_labels else self.class_names[label], digest)
            for split in SPLITS
            for name, label, digest in zip(
                self.split(split).names, self.split(split).labels, short_digests(self.split(split)), strict=True
            )
        ]
        more = self.target.as_rows() if self.target is not None else []
        return rows + [(f"target {split}", name, class_name, digest) for split, name, class_name, digest in more]


def stratified_split(
    names: Sequence[str],
    labels: Index,
    shares: Mapping[str, float],
    seed: int,
    class_names: Sequence[str],
    groups: Sequence[object] | None = None,
) -> dict[str, Index]:
    """Split images into parts with the same class proportions; return part -> sorted positions, one of each class or
    more.

    Within a class, images are ordered by SHA-256 of (seed, name): the result does not depend on the order of the files,
    a library's version, or other classes.  ``shares`` of each class are together below 1; "train" gets the rest.
    ``groups`` [N] are kept together as by ``unite_copies``.  DataError: a class with fewer images than parts.
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
        members = sort_by_hash(names, np.flatnonzero(labels == label), seed)
        sizes = _part_sizes(len(members), shares)
        start = 0
        for part, size in sizes.items():
            parts_found[part].append(members[start : start + size])
            start += size
        parts_found["train"].append(members[start:])
    splits = np.zeros(len(names), np.int8)
    for at, found in enumerate(parts_found.values()):
        splits[np.concatenate(found)] = at
    if groups is not None:
        splits = unite_copies(names, labels, splits, groups)
    return {part: np.flatnonzero(splits == at) for at, part in enumerate(parts_found)}


def unite_copies(
    names: Sequence[str], labels: Index, splits: NDArray[np.int8], groups: Sequence[object]
) -> NDArray[np.int8]:
    """Return the splits [N] of images with those of a group in one: that of its first by name, or the next, so that no
    class loses its last image of a split; where that cannot be, they stay.  ``groups``: None of images to leave alone.

    Example:
        >>> splits = np.array([0, 1, 0, 0, 1], np.int8)
        >>> names, groups = ["a", "b", "c", "d", "e"], ["x", "x", "y", "z", None]
        >>> unite_copies(names, np.zeros(5, np.int64), splits, groups).tolist()
        [0, 0, 0, 0, 1]
    """
    splits, members = splits.copy(), dict[object, list[int]]()
    counts = Counter(zip(labels.tolist(), splits.tolist(), strict=True))
    for i, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(i)
    for group in sorted((group for group, found in members.items() if len(found) > 1), key=str):
        found = members[group]
        if len(set(splits[found].tolist())) == 1:
            continue
        # By name: the first by hash is rarely one of train, which would shrink.
        for split in dict.fromkeys(int(splits[i]) for i in sorted(found, key=names.__getitem__)):
            moved = [i for i in found if splits[i] != split]
            left = Counter((int(labels[i]), int(splits[i])) for i in moved)
            if all(counts[cell] > count for cell, count in left.items()):
                counts.subtract(left)
                counts.update((int(labels[i]), split) for i in moved)
                splits[moved] = split
                break
    return splits


def pool_splits(data: DataSplits) -> DataSplits:
    """Return the data with all images of its splits as ``pool``, in which every name must differ."""
    if data.pool is not None:
        return data
    sets = [data.split(split) for split in SPLITS]
    first = data.train.images if isinstance(data.train, Subset) else None
    is_whole = all(isinstance(each, Subset) and each.images is first for each in sets)
    images = first if is_whole and first is not None else ConcatenatedSet(*sets)
    if len(images) != sum(map(len, sets)):
        images = ConcatenatedSet(*sets)
    if doubled := [name for name, count in Counter(images.names).items() if count > 1]:
        raise DataError(
            f"{data.source}: {len(doubled):,} names are those of several images, such as {doubled[0]!r}: for folds "
            "(data.folds), each image needs a name of its own"
        )
    return replace(data, pool=ImagePool(images, data.fingerprint))


def assign_folds(
    names: Sequence[str],
    labels: Index,
    folds: int,
    seed: int,
    class_names: Sequence[str],
    groups: Index | None = None,
) -> Index:
    """Divide images into folds with the same class proportions.

    Within a class, images are ordered by SHA-256 of (seed, name) and dealt out to the folds in turn; each class goes on
    where the one before has ended.  So the sizes of the folds, and those of a class in them, differ by one at most.

    ``groups`` [N] keep images in one fold, that of the group's first.  DataError: classes with too few images or
    groups.

    Example:
        >>> assign_folds(["a", "b", "c", "d", "e", "f"], np.array([0, 0, 0, 1, 1, 1]), 3, 0, ["x", "y"]).tolist()
        [2, 1, 0, 2, 1, 0]
    """
    _, first, group = np.unique(np.arange(len(names)) if groups is None else groups, return_index=True,
                                return_inverse=True)  # fmt: skip
    counts = np.bincount(labels[first], minlength=len(class_names))
    # A fold's training part needs two images of each class: one for train and one for val.
    small = np.flatnonzero((counts < folds) | (counts - -(-counts // folds) < 2))
    if len(small):
        listed = [f"{class_names[i]!r} has {counts[i]}" for i in small[:20]]
        what = "images" if groups is None or len(first) == len(names) else "different images"
        most = int(max(0, counts.min())) if counts.min() > 2 else 0
        needed = 4 if folds == 2 else max(folds, 3)
        advice = f"at most {most} folds are possible" if most else "give these classes more images, or leave them out"
        raise DataError(
            f"not enough images for {folds} folds: every class needs at least {needed} {what}, but "
            f"{', '.join(listed)}{f' and {len(small) - 20} more classes are too small' if len(small) > 20 else ''}; "
            f"{advice}"
        )
    of_group, turn = np.empty(len(first), dtype=np.int64), 0
    position = {int(image): at for at, image in enumerate(first)}
    for label in range(len(class_names)):
        members = sort_by_hash(names, first[labels[first] == label], seed)
        of_group[[position[int(image)] for image in members]] = (turn + np.arange(len(members))) % folds
        turn += len(members)
    found: Index = of_group[group.reshape(-1)]
    return found


def fold_splits(data: DataSplits, settings: DataSettings) -> DataSplits:
    """Return the splits of ``settings.fold``: the fold's images are test, the others train and val by ``settings.val``.

    Files of equal content stay in one fold.  The fold "all" has one image of each class in test.
    """
    folds, fold = settings.folds, settings.fold
    if folds is None or fold is None:
        raise UsageError(
            f"data.folds: {folds} makes {folds} runs, and here is one: name its fold with data.fold (1 to {folds}), or "
            "leave data.folds out; `potstill run` runs all folds"
        )
    pooled = pool_splits(data)
    assert pooled.pool is not None
    pool = pooled.pool.images
    labels, names = np.asarray(pool.labels), pool.names
    digests = file_digests(pool)
    copies = None if digests is None else np.unique(digests, axis=0, return_inverse=True)[1].reshape(-1)
    own = assign_folds(names, labels, folds, settings.split_seed, data.class_names, copies)
    if fold == "all":
        members = (np.flatnonzero(labels == label) for label in range(len(data.class_names)))
        chosen = [sort_by_hash(names, each, settings.split_seed)[0] for each in members]
        in_test = np.isin(np.arange(len(pool)), chosen)
        origin = "for the model to deploy: all images are train and val, but one of each class, which are test"
    else:
        in_test = own == fold - 1
        origin = f"fold {fold} of {folds}: its {int(in_test.sum()):,} images are test in this fold only"
    rest = np.flatnonzero(~in_test)
    others, groups = [names[i] for i in rest.tolist()], None if copies is None else copies[rest].tolist()
    parts = stratified_split(others, labels[rest], {"val": settings.val}, settings.split_seed, data.class_names, groups)
    index = {"train": rest[parts["train"]], "val": rest[parts["val"]], "test": np.flatnonzero(in_test)}
    lines = (f"{split}\0{names[i]}" for split, found in index.items() for i in found.tolist())
    text = "\n".join([data.fingerprint, *lines]).encode("utf-8", "surrogateescape")
    given = not data.origin.startswith("made here") or "are pooled" in data.origin
    identity = f"{pooled.pool.fingerprint}/train"  # as that of a loader of all images
    train, val, test = (Subset(pool, index[split], identity=identity) for split in SPLITS)
    check_splits(data.class_names, {"train": train, "val": val, "test": test}, data.source)
    return replace(
        pooled,
        train=train,
        val=val,
        test=test,
        origin=f"{origin}; stratified, split seed {settings.split_seed}, val is {100 * settings.val:g} % of the rest"
        f"{'; the splits of the source are pooled' if given else ''}",
        fingerprint=hashlib.sha256(text).hexdigest(),
    )


def stratified_subset(names: Sequence[str], labels: Index, count: int, seed: int) -> Index:
    """Return about ``count`` sorted positions with the same class proportions, at least one image of each class."""
    chosen = []
    for label in np.unique(labels):
        members = sort_by_hash(names, np.flatnonzero(labels == label), seed)
        chosen.append(members[: max(1, round(count * len(members) / len(labels)))])
    return np.sort(np.concatenate(chosen))


def fingerprint(
    parts: Mapping[str, ImageSet], class_names: Sequence[str], contents: Mapping[str, Sequence[str]]
) -> str:
    """Return the SHA-256 of names, contents, labels and splits in 64 hex digits, whatever the order of the files."""
    lines = sorted(
        "\0".join((split, name, class_names[label] if label >= 0 else "", content))
        for split, images in parts.items()
        for name, label, content in zip(images.names, images.labels, contents[split], strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def check_splits(class_names: Sequence[str], parts: Mapping[str, ImageSet], source: str) -> None:
    """Check that every class has images in every split; all problems in one message."""
    if len(class_names) < 2:
        found = f"only {class_names[0]!r}" if class_names else "none"
        raise DataError(f"{source}: a classifier needs at least two classes, found {found}")
    problems, lacking = list[str](), list[str]()
    for split, images in parts.items():
        counts = np.bincount(images.labels, minlength=len(class_names))
        if len(counts) > len(class_names):
            problems.append(f"{split} has label {len(counts) - 1}, but there are {len(class_names)} classes")
        missing = [repr(name) for name, count in zip(class_names, counts, strict=False) if count == 0]
        if missing:
            problems.append(f"{split} has no images of {format_names(missing, 10)}")
            lacking.append(split)
    if problems:
        way = "\nLeave these classes out everywhere" if lacking else ""
        if lacking and "train" not in lacking:
            way += f", or give the data without {' and '.join(lacking)}, for which images of train are then split off"
        raise DataError(f"{source}: every class needs images in train, val and test, but " + "; ".join(problems) + way)


def _part_sizes(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return rounded sizes of a class's parts, at least 1 each, that leave at least 1 for train."""
    sizes = {part: max(1, int(count * share + 0.5)) for part, share in shares.items()}
    while sum(sizes.values()) >= count:
        sizes[max(sizes, key=lambda part: sizes[part])] -= 1
    return sizes


def sort_by_hash(names: Sequence[str], members: Index, seed: int) -> Index:
    """Return positions in an order that depends on the seed and the names of their images alone."""

    def key(i: int) -> bytes:
        return hashlib.sha256(f"{seed}/{names[i]}".encode("utf-8", "surrogateescape")).digest()

    return np.array(sorted(members.tolist(), key=key), dtype=np.int64)


UNSPLIT = -1
MAX_IMBALANCE = 10.0  # images of the largest class of train for each of the smallest


@dataclass(frozen=True)
class SplitAssignment:
    """Labels and splits of the images of a listing."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]  # [N] class ids
    splits: NDArray[np.int8]  # [N] positions in SPLITS, or UNSPLIT
    origin: str  # one sentence: where the splits come from

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Return split -> [K] number of images by class; "all" if they could not be split."""
        names = {UNSPLIT: "all", **dict(enumerate(SPLITS))}
        classes = len(self.class_names)
        found = {name: np.bincount(self.labels[self.splits == at], minlength=classes) for at, name in names.items()}
        return {name: counts for name, counts in found.items() if counts.any() or (name != "all" and self.split)}

    @property
    def split(self) -> bool:
        """Whether the images are split."""
        return bool((self.splits != UNSPLIT).any())


def assign_splits(listing: Listing, settings: DataSettings) -> tuple[SplitAssignment, list[Finding]]:
    """Return the source's splits, with missing ones split off by ``settings`` if the classes are large enough."""
    entries = listing.entries
    class_names = tuple(sorted({entry.label for entry in entries}))
    ids = {name: i for i, name in enumerate(class_names)}
    labels = np.array([ids[entry.label] for entry in entries], dtype=np.int64)
    at: dict[str | None, int] = {None: UNSPLIT, **{split: i for i, split in enumerate(SPLITS)}}
    splits = np.array([at[entry.split] for entry in entries], dtype=np.int8)
    if listing.ready:
        origin, findings = listing.kind, list[Finding]()
    else:
        origin, findings = _fill_splits(listing, labels, splits, class_names, settings)
        origin += listing.regrouped
    division = SplitAssignment(class_names, labels, splits, origin)
    if not settings.labeled:
        return division, findings
    return division, findings + _find_missing_classes(division, listing) + _find_imbalance(division)


def keep_copies_together(division: SplitAssignment, listing: Listing, contents: Mapping[str, str]) -> SplitAssignment:
    """Return the splits with files of equal content in one, as far as they were made here; ``contents`` by name."""
    if listing.ready or not division.split or {"val", "test"} <= {entry.split for entry in listing.entries}:
        return division
    groups = [
        contents[entry.name].split()[1] if entry.split in (None, "train") and entry.name in contents else None
        for entry in listing.entries
    ]
    names = [entry.name for entry in listing.entries]
    return replace(division, splits=unite_copies(names, division.labels, division.splits, groups))


def _fill_splits(
    listing: Listing, labels: NDArray[np.int64], splits: NDArray[np.int8], class_names: tuple[str, ...],
    settings: DataSettings,
) -> tuple[str, list[Finding]]:  # fmt: skip
    """Fill in ``splits`` in place; return a sentence on their origin, and findings."""
    given = [split for i, split in enumerate(SPLITS) if (splits == i).any()]
    shares = {split: share for split, share in (("val", settings.val), ("test", settings.test)) if split not in given}
    words = " ".join([listing.kind, ", ".join(given) if given else "without splits"])
    if not shares or (given and "train" not in given):
        return words, []
    pool = np.flatnonzero(splits == (0 if given else UNSPLIT))
    counts = np.bincount(labels[pool], minlength=len(class_names))
    small = [i for i in range(len(class_names)) if 0 < counts[i] <= len(shares)]
    if small or not len(pool):
        return words, [
            _too_few_finding(listing, pool[labels[pool] == i], class_names[i], ["train", *shares]) for i in small
        ]
    names = [listing.entries[i].name for i in pool]
    for split, positions in _stratify_present(names, labels[pool], shares, settings.split_seed, class_names).items():
        splits[pool[positions]] = SPLITS.index(split)
    how = f"stratified, split seed {settings.split_seed}"
    if given:
        taken = " and ".join(f"{split} ({100 * share:g} %)" for split, share in shares.items())
        return f"{words}; {taken} split from train here, {how}", []
    parts = "/".join(f"{100 * share:g}" for share in (1 - sum(shares.values()), *shares.values()))
    return f"made here: {how.replace('stratified', f'stratified {parts}')}", []


def _stratify_present(
    names: list[str], labels: NDArray[np.int64], shares: dict[str, float], seed: int, class_names: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Return ``stratified_split`` over the classes that are present in the pool."""
    present, own = np.unique(labels, return_inverse=True)
    return stratified_split(names, own.astype(np.int64), shares, seed, [class_names[i] for i in present])


def _too_few_finding(listing: Listing, members: NDArray[np.int64], name: str, parts: list[str]) -> Finding:
    first = listing.entries[int(members[0])]
    place = (
        "."
        if listing.kind != "folders" or listing.regrouped
        else "/".join(first.name.split("/")[: 1 if first.split is None else 2])
    )
    needed = f"not enough images for a split into {', '.join(parts)}: every class needs at least {len(parts)}"
    return Finding("too-few", place, f"{needed}, but {name!r} has {len(members)}")


def _find_missing_classes(division: SplitAssignment, listing: Listing) -> list[Finding]:
    names = division.class_names
    if not names and listing.findings:
        return []  # they give the reason
    if len(names) < 2:
        if any(each.kind.startswith(("link", "unreadable")) for each in listing.findings):
            return []  # whose images may be those of the other classes
        found = f"only {names[0]!r}" if names else "none"
        reason = f"a classifier needs at least two classes, found {found}{_nested_folder_hint(listing)}"
        return [Finding("one-class", ".", reason)]
    if not division.split or (listing.kind == "folders" and not listing.regrouped):  # whose walk compares the folders
        return []
    return [
        Finding("missing-class", ".", f"class {name!r} has no images in {split}")
        for split, counts in division.counts().items()
        for name, count in zip(names, counts, strict=True)
        if split != "all" and not count
    ]


def _nested_folder_hint(listing: Listing) -> str:
    """Return a hint if the class folders are one level further down."""
    paths = [entry.name.split("/")[int(entry.split is not None) :] for entry in listing.entries]
    inner = sorted({path[1] for path in paths if len(path) > 2})
    if (
        listing.kind != "folders"
        or listing.regrouped
        or len(inner) < 2
        or any(entry.split for entry in listing.entries)
    ):
        return ""
    return f"; with folders {', '.join(inner[:3])} in it: if these are the classes, give {paths[0][0]} as the data"


def find_small_classes(listing: Listing, settings: DataSettings) -> list[Finding]:
    """Return findings for classes without an image in a given split, or with too few for the splits to be made."""
    counts: dict[str, Counter[str | None]] = {}
    for entry in listing.entries:
        counts.setdefault(entry.label, Counter())[entry.split] += 1
    given = [split for split in SPLITS if any(found[split] for found in counts.values())]
    shares = [split for split in ("val", "test") if split not in given]
    needed = len(shares) + 1
    found = []
    for name, own in sorted(counts.items()):
        missing = [split for split in given if not own[split]]
        pool = own["train" if given else None]
        if missing:
            reason = f"class {name!r} has no images in {' and '.join(missing)}; its {own.total():,} images are left out"
            found.append(Finding("missing-class", name, reason))
        elif pool < needed:
            reason = f"class {name!r} has {pool} of the {needed} images needed for {', '.join(['train', *shares])}"
            found.append(Finding("too-few", name, reason))
    return found


def _find_imbalance(division: SplitAssignment) -> list[Finding]:
    counts = division.counts().get("train" if division.split else "all", np.zeros(1, dtype=np.int64))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if not counts[smallest] or counts[largest] < MAX_IMBALANCE * counts[smallest]:
        return []
    few, many = (f"{division.class_names[i]!r} has {counts[i]:,}" for i in (smallest, largest))
    advice = "see data.class_balance, and pick the epoch by f1_macro"
    return [Finding("imbalance", ".", f"of the images to train on, {many} and {few}; {advice}")]


def split_by_settings(
    settings: DataSettings, images: ImageSet, class_names: Sequence[str]
) -> tuple[dict[str, ImageSet], str]:
    """Return a stratified split by ``settings.val``, ``settings.test`` and ``settings.split_seed``, and its origin."""
    shares = {"val": settings.val, "test": settings.test}
    parts = stratified_split(images.names, images.labels, shares, settings.split_seed, class_names)
    percent = "/".join(f"{100 * share:g}" for share in (1 - settings.val - settings.test, settings.val, settings.test))
    sentence = f"made here: stratified {percent}, split seed {settings.split_seed}"
    return {split: Subset(images, parts[split]) for split in ("train", "val", "test")}, sentence
