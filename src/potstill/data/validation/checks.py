"""Checks of a whole data set: duplicates within and across splits, similar names, value ranges."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.data.entries import Finding
from potstill.data.image_io import ValueRange, ValueSpan, compute_range, format_range
from potstill.data.splits import SPLITS, UNSPLIT, SplitAssignment
from potstill.data.validation import ScanTable

_MAX_NAMES = 3
LEAKAGE_SHARE = 0.01  # share of val or test from which on images seen before change what its figures mean

# Which splits an image of this one must not have been seen in: train is learned, val picks the epoch.
_SEEN_BEFORE = {"val": ("train",), "test": ("train", "val")}


@dataclass(frozen=True)
class HashedImages:
    """N images, with the hashes that identify duplicates."""

    names: Sequence[str]
    class_names: Sequence[str]
    labels: NDArray[np.int64]  # [N]
    splits: NDArray[np.int8]  # [N] positions in SPLITS, or -1
    content: NDArray[np.uint8]  # [N, 32] SHA-256 of the files
    pixels: NDArray[np.uint8]  # [N, D] a hash of the pixels; that of the content if pixels are unknown

    def where(self, i: int) -> str:
        """Return label and split of image i, as text; images without labels have the class ""."""
        if not self.class_names[self.labels[i]]:
            return SPLITS[self.splits[i]]
        split = "" if self.splits[i] == UNSPLIT else f" in {SPLITS[self.splits[i]]}"
        return f"{self.class_names[self.labels[i]]!r}{split}"


@dataclass(frozen=True)
class Duplicates:
    """Result of comparing all images."""

    findings: list[Finding]
    by_content: int  # files with the content of an earlier one
    by_pixels: int  # images with the pixels of an earlier one
    seen_before: dict[str, int]  # images of val and test that are also in an earlier split


def find_duplicates(images: HashedImages) -> Duplicates:
    """Return one finding for each image that occurs more than once."""
    together = list(group_equal_rows(images.pixels))
    seen = {
        split: sum(len(_members(images, group, split)) for group in together if _seen(images, group, split))
        for split in _SEEN_BEFORE
    }
    sizes = {split: int((images.splits == SPLITS.index(split)).sum()) for split in _SEEN_BEFORE}
    many = {split for split, count in seen.items() if count and count >= LEAKAGE_SHARE * sizes[split]}
    findings = [_finding(images, group, many) for group in together]
    by_content = sum(len(group) - 1 for group in group_equal_rows(images.content)) if images.content.any() else 0
    return Duplicates(findings, by_content, sum(len(group) - 1 for group in together), seen)


def group_equal_rows(digests: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of each group of equal rows, sorted; groups are sorted by their first.

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


def _members(images: HashedImages, group: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    inside: NDArray[np.bool_] = images.splits[group] == SPLITS.index(split)
    return group[inside]


def _seen(images: HashedImages, group: NDArray[np.int64], split: str) -> bool:
    return any(len(_members(images, group, other)) for other in _SEEN_BEFORE[split])


def _finding(images: HashedImages, group: NDArray[np.int64], many: set[str]) -> Finding:
    first, *rest = group.tolist()
    others = tuple(images.names[i] for i in rest)
    same = _same(images, first, rest)
    across = [s for s in _SEEN_BEFORE if len(_members(images, group, s)) and _seen(images, group, s)]
    places = sorted({images.where(i) for i in (first, *rest)})
    if len(set(images.labels[group].tolist())) > 1:
        return Finding(
            "two-labels", images.names[first], f"{same}, as {_join_words(places)}; keep the right one", others
        )
    if across:
        kind = "across-splits" if many.intersection(across) else "few-across-splits"
        return Finding(kind, images.names[first], f"{same}, {_join_words(places)}; keep one of them", others)
    return Finding("duplicate", images.names[first], f"{same}, {_join_words(places)}", others)


def _same(images: HashedImages, first: int, rest: list[int]) -> str:
    """Return a text such as: the same file as a.png, the same pixels as b.bmp."""
    known = bool(images.content[first].any())
    equal = (images.content[rest] == images.content[first]).all(axis=1) & known
    names = {what: [images.names[i] for i, own in zip(rest, equal.tolist(), strict=True) if own == same]
             for what, same in (("file", True), ("pixels", False))}  # fmt: skip
    return ", ".join(f"the same {what} as {_join_words(found)}" for what, found in names.items() if found)


def _join_words(words: list[str]) -> str:
    shown = [*words[:_MAX_NAMES], *([f"{len(words) - _MAX_NAMES} more"] if len(words) > _MAX_NAMES else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def similar_classes(class_names: Iterable[str]) -> list[Finding]:
    """Return findings on classes like "Cat", "cat" and "cat "."""
    return [
        Finding("similar-names", group[0], f"classes {', '.join(map(repr, group))}; rename or join them")
        for group in _groups(class_names)
    ]


def similar_files(names: Iterable[str]) -> list[Finding]:
    """Return findings on files like "a.JPG" and "a.jpg" in the same folder."""
    return [
        Finding("similar-names", group[0], "where case does not count, one overwrites the other", tuple(group[1:]))
        for group in _groups(names)
    ]


def _groups(names: Iterable[str]) -> list[list[str]]:
    first: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name in names:
        folder, slash, own = name.rpartition("/")
        key = folder + slash + unicodedata.normalize("NFC", own.strip()).casefold()
        if key in first:
            found.setdefault(key, [first[key]]).append(name)
        else:
            first[key] = name
    return list(found.values())


NARROW = 8  # an image that uses less than 1/8 of the range shows less than 5 of 8 bits
_FULL: ValueRange = (0.0, 65535.0)  # of 16-bit colours, of which the high byte is read


def check_ranges(
    names: list[str], division: SplitAssignment, table: ScanTable, setting: ValueRange | Literal["auto"]
) -> tuple[ValueRange | None, list[Finding]]:
    """Return the value range of a data set, and findings on it.

    Args:
        names: [N], of the images.
        division: their labels and splits.
        table: their scans.
        setting: ``data.range``.
    """
    good = table.good
    wide = good[table.rows["span"][good] > 0]
    if not len(wide):
        return (None if setting == "auto" else setting), []
    spans = {i: span for i in wide.tolist() if (span := table.span(i)) is not None}
    train = set(np.flatnonzero(division.splits == SPLITS.index("train")).tolist())
    found = compute_range(span for i, span in spans.items() if i in train) or compute_range(spans.values())
    ends = found if setting == "auto" else setting
    findings = _check_mixed(len(good), spans)
    for i, span in spans.items():
        findings += _check_span(names[i], span, _FULL if span.kind == "colour" or ends is None else ends)
    return ends, findings


def _check_span(name: str, span: ValueSpan, ends: ValueRange) -> list[Finding]:
    low, high = ends
    what = f"values from {span.low:.6g} to {span.high:.6g}"
    if span.kind != "colour" and (span.low < low or span.high > high):
        return [Finding("beyond-range", name, f"{what}, the range is {format_range(ends)}")]
    if span.high - low < (high - low + (span.kind == "integer")) / NARROW and high - low > 255:
        return [Finding("narrow-range", name, f"{what}, the range is {format_range(ends)}")]
    if span.kind == "float" and span.high - low < (high - low) / NARROW:
        return [Finding("narrow-range", name, f"{what}, the range is {format_range(ends)}")]
    return []


def _check_mixed(images: int, spans: dict[int, ValueSpan]) -> list[Finding]:
    """Return a finding if images of different depths share one range."""
    counts = {
        "of integers of more than 8 bits": sum(span.kind == "integer" for span in spans.values()),
        "of floats within [0, 1]": sum(
            span.kind == "float" and 0 <= span.low <= span.high <= 1 for span in spans.values()
        ),
        "of floats beyond [0, 1]": sum(
            span.kind == "float" and not 0 <= span.low <= span.high <= 1 for span in spans.values()
        ),
        "of 16-bit colours": sum(span.kind == "colour" for span in spans.values()),
        "of 8 bits": images - len(spans),
    }
    found = [f"{count:,} {what}" for what, count in counts.items() if count]
    if len(found) < 2:
        return []
    return [Finding("mixed-range", ".", f"{', '.join(found)}: the same gray may be bright in some and dark in others")]
