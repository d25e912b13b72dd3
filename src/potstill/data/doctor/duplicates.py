"""The same picture more than once: within a split, across splits, under two labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.data.doctor.division import UNSPLIT
from potstill.data.doctor.findings import Finding
from potstill.data.splits import SPLITS

_SHOWN = 3
MANY = 0.01  # share of val or test from which on images seen before change what its figures mean

# Which splits an image of this one must not have been seen in: train is learned, val picks the epoch.
_SEEN_BEFORE = {"val": ("train",), "test": ("train", "val")}


@dataclass(frozen=True)
class Pictures:
    """N images, by name, class and split, with what tells them apart."""

    names: Sequence[str]
    class_names: Sequence[str]
    labels: NDArray[np.int64]  # [N]
    splits: NDArray[np.int8]  # [N] positions in SPLITS, or -1
    content: NDArray[np.uint8]  # [N, 32] SHA-256 of the files
    pixels: NDArray[np.uint8]  # [N, D] a hash of the pixels; that of the content where pixels are not known

    def where(self, i: int) -> str:
        """Label and split of image i."""
        split = "" if self.splits[i] == UNSPLIT else f" in {SPLITS[self.splits[i]]}"
        return f"{self.class_names[self.labels[i]]!r}{split}"


@dataclass(frozen=True)
class Repeats:
    """What came of comparing all pictures."""

    findings: list[Finding]
    by_content: int  # files that have the content of another one before them
    by_pixels: int  # images that show what another one before them shows, bytes aside
    seen_before: dict[str, int]  # images of val and test that are also in splits before them


def find_repeats(pictures: Pictures) -> Repeats:
    """One finding for each picture that is there more than once."""
    together = list(groups(pictures.pixels))
    seen = {
        split: sum(len(_members(pictures, group, split)) for group in together if _seen(pictures, group, split))
        for split in _SEEN_BEFORE
    }
    sizes = {split: int((pictures.splits == SPLITS.index(split)).sum()) for split in _SEEN_BEFORE}
    many = {split for split, count in seen.items() if count and count >= MANY * sizes[split]}
    findings = [_finding(pictures, group, many) for group in together]
    by_content = sum(len(group) - 1 for group in groups(pictures.content)) if pictures.content.any() else 0
    return Repeats(findings, by_content, sum(len(group) - 1 for group in together), seen)


def groups(digests: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    """Positions of rows that are equal, two or more, each in order; the groups by their first.

    Args:
        digests: [N, D], D a multiple of 8.
    """
    if not len(digests):
        return
    columns = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(columns.T)  # stable: equal rows stay in order
    new = np.flatnonzero((columns[order[1:]] != columns[order[:-1]]).any(axis=1)) + 1
    found = [group for group in np.split(order, new) if len(group) > 1]
    yield from sorted(found, key=lambda group: int(group[0]))


def _members(pictures: Pictures, group: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    inside: NDArray[np.bool_] = pictures.splits[group] == SPLITS.index(split)
    return group[inside]


def _seen(pictures: Pictures, group: NDArray[np.int64], split: str) -> bool:
    return any(len(_members(pictures, group, other)) for other in _SEEN_BEFORE[split])


def _finding(pictures: Pictures, group: NDArray[np.int64], many: set[str]) -> Finding:
    first, *rest = group.tolist()
    others = tuple(pictures.names[i] for i in rest)
    same = _same(pictures, first, rest)
    across = [s for s in _SEEN_BEFORE if len(_members(pictures, group, s)) and _seen(pictures, group, s)]
    places = sorted({pictures.where(i) for i in (first, *rest)})
    if len(set(pictures.labels[group].tolist())) > 1:
        return Finding("two-labels", pictures.names[first], f"{same}, as {_joined(places)}; keep the right one", others)
    if across:
        kind = "across-splits" if many.intersection(across) else "few-across-splits"
        return Finding(kind, pictures.names[first], f"{same}, {_joined(places)}; keep one of them", others)
    return Finding("duplicate", pictures.names[first], f"{same}, {_joined(places)}", others)


def _same(pictures: Pictures, first: int, rest: list[int]) -> str:
    """Such as: the same file as a.png, the same pixels as b.bmp."""
    known = bool(pictures.content[first].any())
    equal = (pictures.content[rest] == pictures.content[first]).all(axis=1) & known
    names = {what: [pictures.names[i] for i, own in zip(rest, equal.tolist(), strict=True) if own == same]
             for what, same in (("file", True), ("pixels", False))}  # fmt: skip
    return ", ".join(f"the same {what} as {_joined(found)}" for what, found in names.items() if found)


def _joined(words: list[str]) -> str:
    shown = [*words[:_SHOWN], *([f"{len(words) - _SHOWN} more"] if len(words) > _SHOWN else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
