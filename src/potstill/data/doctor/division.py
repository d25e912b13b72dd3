"""Which images are for train, val and test, as `potstill run` would have it, and whether each class is in each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.data.doctor.findings import Finding
from potstill.data.doctor.listing import Listing
from potstill.data.settings import DataSettings
from potstill.data.splits import SPLITS, stratified

UNSPLIT = -1
MOST_UNEQUAL = 10.0  # images of the largest class of train for each of the smallest


@dataclass(frozen=True)
class Division:
    """Labels and splits of the images of a listing."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]  # [N] class ids
    splits: NDArray[np.int8]  # [N] positions in SPLITS, or UNSPLIT
    origin: str  # one sentence: where the splits come from

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Split -> [K] images by class; "all" where they could not be split."""
        names = {UNSPLIT: "all", **dict(enumerate(SPLITS))}
        classes = len(self.class_names)
        found = {name: np.bincount(self.labels[self.splits == at], minlength=classes) for at, name in names.items()}
        return {name: counts for name, counts in found.items() if counts.any() or (name != "all" and self.split)}

    @property
    def split(self) -> bool:
        """Whether there are splits."""
        return bool((self.splits != UNSPLIT).any())


def divide(listing: Listing, settings: DataSettings) -> tuple[Division, list[Finding]]:
    """Splits as the source gives them; what it lacks is made as ``settings`` say, where classes are large enough.

    Raises:
        DataError: the shares of ``settings`` leave no images for train.
    """
    entries = listing.entries
    class_names = tuple(sorted({entry.label for entry in entries}))
    ids = {name: i for i, name in enumerate(class_names)}
    labels = np.array([ids[entry.label] for entry in entries], dtype=np.int64)
    at: dict[str | None, int] = {None: UNSPLIT, **{split: i for i, split in enumerate(SPLITS)}}
    splits = np.array([at[entry.split] for entry in entries], dtype=np.int8)
    if listing.ready:
        origin, findings = listing.kind, list[Finding]()
    else:
        origin, findings = _complete(listing, labels, splits, class_names, settings)
    division = Division(class_names, labels, splits, origin)
    return division, findings + _missing(division, listing) + _imbalance(division)


def _complete(
    listing: Listing, labels: NDArray[np.int64], splits: NDArray[np.int8], class_names: tuple[str, ...],
    settings: DataSettings,
) -> tuple[str, list[Finding]]:  # fmt: skip
    """Fill in ``splits``; a sentence on where they come from."""
    given = [split for i, split in enumerate(SPLITS) if (splits == i).any()]
    shares = {split: share for split, share in (("val", settings.val), ("test", settings.test)) if split not in given}
    words = " ".join([listing.kind, ", ".join(given) if given else "without splits"])
    if not shares or (given and "train" not in given):
        return words, []
    pool = np.flatnonzero(splits == (0 if given else UNSPLIT))
    counts = np.bincount(labels[pool], minlength=len(class_names))
    small = [i for i in range(len(class_names)) if 0 < counts[i] <= len(shares)]
    if small or not len(pool):
        return words, [_too_few(listing, pool[labels[pool] == i], class_names[i], ["train", *shares]) for i in small]
    names = [listing.entries[i].name for i in pool]
    for split, positions in _made(names, labels[pool], shares, settings.split_seed, class_names).items():
        splits[pool[positions]] = SPLITS.index(split)
    how = f"stratified, split seed {settings.split_seed}"
    if given:
        taken = " and ".join(f"{split} ({100 * share:g} %)" for split, share in shares.items())
        return f"{words}; {taken} split from train here, {how}", []
    parts = "/".join(f"{100 * share:g}" for share in (1 - sum(shares.values()), *shares.values()))
    return f"made here: {how.replace('stratified', f'stratified {parts}')}", []


def _made(
    names: list[str], labels: NDArray[np.int64], shares: dict[str, float], seed: int, class_names: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """As ``stratified``, for the classes that there are in this pool."""
    present, own = np.unique(labels, return_inverse=True)
    return stratified(names, own.astype(np.int64), shares, seed, [class_names[i] for i in present])


def _too_few(listing: Listing, members: NDArray[np.int64], name: str, parts: list[str]) -> Finding:
    """``members``: of a class, not enough for those parts."""
    first = listing.entries[int(members[0])]
    place = "." if listing.kind != "folders" else "/".join(first.name.split("/")[: 1 if first.split is None else 2])
    needed = f"not enough images for a split into {', '.join(parts)}: every class needs at least {len(parts)}"
    return Finding("too-few", place, f"{needed}, but {name!r} has {len(members)}")


def _missing(division: Division, listing: Listing) -> list[Finding]:
    names = division.class_names
    if not names and listing.findings:
        return []  # they say why
    if len(names) < 2:
        if any(each.kind.startswith(("link", "unreadable")) for each in listing.findings):
            return []  # whose images may be those of the other classes
        found = f"only {names[0]!r}" if names else "none"
        reason = f"a classifier needs at least two classes, found {found}{_deeper(listing)}"
        return [Finding("one-class", ".", reason)]
    if not division.split or listing.kind == "folders":  # whose walk has compared the folders
        return []
    return [
        Finding("missing-class", ".", f"class {name!r} has no images in {split}")
        for split, counts in division.counts().items()
        for name, count in zip(names, counts, strict=True)
        if split != "all" and not count
    ]


def _deeper(listing: Listing) -> str:
    """A hint where the class folders lie one folder further down."""
    paths = [entry.name.split("/")[int(entry.split is not None) :] for entry in listing.entries]
    inner = sorted({path[1] for path in paths if len(path) > 2})
    if listing.kind != "folders" or len(inner) < 2 or any(entry.split for entry in listing.entries):
        return ""
    return f"; with folders {', '.join(inner[:3])} in it: if these are the classes, give {paths[0][0]} as the data"


def small_classes(listing: Listing, settings: DataSettings) -> list[Finding]:
    """Classes that a run cannot take: without an image in one of the given splits, or with fewer than are to be split
    off; ``path`` is the name of the class.
    """
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
            found.append(Finding("missing-class", name, f"class {name!r} has no images in {' and '.join(missing)}"))
        elif pool < needed:
            reason = f"class {name!r} has {pool} of the {needed} images needed for {', '.join(['train', *shares])}"
            found.append(Finding("too-few", name, reason))
    return found


def _imbalance(division: Division) -> list[Finding]:
    counts = division.counts().get("train" if division.split else "all", np.zeros(1, dtype=np.int64))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if not counts[smallest] or counts[largest] < MOST_UNEQUAL * counts[smallest]:
        return []
    few, many = (f"{division.class_names[i]!r} has {counts[i]:,}" for i in (smallest, largest))
    advice = "see data.balance, and pick the epoch by f1_macro"
    return [Finding("imbalance", ".", f"of the images to train on, {many} and {few}; {advice}")]
