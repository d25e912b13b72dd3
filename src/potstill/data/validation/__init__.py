"""Validation of a data set (``potstill check``): every problem, each with path and reason.

Here the report, with image statistics and sorted findings, as JSON and as text (not escaped yet); and the checks of a
whole data set: duplicates within and across splits, similar names, value ranges.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.data.entries import FINDING_KINDS, Finding, Severity, suggest_fixes
from potstill.data.image_io import SPAN_KINDS, ValueRange, ValueSpan, compute_range, format_range
from potstill.data.scan import ImageScan
from potstill.data.splits import SPLITS, UNSPLIT, SplitAssignment
from potstill.formatting import format_count, format_many, format_scaled

_ROW = np.dtype(
    [
        ("good", np.bool_), ("bytes", np.int64), ("format", np.uint8), ("mode", np.uint8), ("width", np.int32),
        ("height", np.int32), ("content", np.uint8, 32), ("pixels", np.uint8, 16), ("state", np.int64, 4),
        ("span", np.uint8), ("low", np.float64), ("high", np.float64),
    ]
)  # fmt: skip


class ScanTable:
    """Scans of N images, 116 bytes each."""

    def __init__(self, count: int) -> None:
        self.rows = np.zeros(count, dtype=_ROW)
        self._words: list[str] = []  # formats and modes, by number

    def add(self, i: int, scan: ImageScan) -> None:
        """Add the scan of image i."""
        content, pixels = (np.frombuffer(value, np.uint8) for value in (scan.content, scan.pixels))
        kind, mode = self._number(scan.format), self._number(scan.mode)
        self.rows[i] = (True, scan.size, kind, mode, scan.width, scan.height, content, pixels, scan.state, *_span(scan))

    def span(self, i: int) -> ValueSpan | None:
        """Return the value span of image i; None: 8 bits."""
        kind, low, high = (self.rows[i][key].item() for key in ("span", "low", "high"))
        return ValueSpan(SPAN_KINDS[kind - 1], low, high) if kind else None

    def keep(self, positions: list[int]) -> None:
        """Keep only these images."""
        self.rows = self.rows[positions]

    @property
    def good(self) -> NDArray[np.int64]:
        """Positions of the images that could be decoded."""
        return np.flatnonzero(self.rows["good"])

    def figures(self) -> dict[str, Any]:
        """Return counts of formats and modes; smallest, median and largest sizes."""
        rows = self.rows[self.rows["good"]]
        return {
            "decoded": len(rows),
            "bytes": int(rows["bytes"].sum()),
            "formats": self._counted(rows["format"]),
            "modes": self._counted(rows["mode"]),
            "width": _min_median_max(rows["width"]),
            "height": _min_median_max(rows["height"]),
            "file_bytes": _min_median_max(rows["bytes"]),
            "shapes": len({*zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)}),
        }

    def _number(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    def _counted(self, numbers: NDArray[np.uint8]) -> dict[str, int]:
        return {self._words[at]: count for at, count in Counter(numbers.tolist()).most_common()}


def _span(scan: ImageScan) -> tuple[int, float, float]:
    if scan.span is None:
        return 0, float(scan.ends[0]), float(scan.ends[1])
    return SPAN_KINDS.index(scan.span.kind) + 1, scan.span.low, scan.span.high


def _min_median_max(values: NDArray[Any]) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"smallest": int(values.min()), "median": int(np.median(values)), "largest": int(values.max())}


FORMAT = 1

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class ValidationReport:
    """What was found in a data set."""

    source: str  # as given
    images: int  # number in the listing
    passed_over: int  # hidden and system files and folders
    division: SplitAssignment
    figures: dict[str, Any]  # see docs/check.md
    repeats: dict[str, Any]  # numbers of duplicates; see docs/check.md
    findings: list[Finding]  # errors first, by kind, by path
    skipped: list[Finding] = field(default_factory=list)  # left out by data.skip_bad
    notes: list[str] = field(default_factory=list)  # remarks that are no findings

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity ("error" or "warning")."""
        return sum(each.severity == severity for each in self.findings)

    def kinds(self) -> dict[str, int]:
        """Return kind -> number of findings, in the order of FINDING_KINDS."""
        counted = Counter(each.kind for each in self.findings)
        return {kind: counted[kind] for kind in FINDING_KINDS if kind in counted}

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        names = self.division.class_names
        counts = {s: dict(zip(names, c.tolist(), strict=True)) for s, c in self.division.counts().items()}
        return {
            "format": FORMAT,
            "source": self.source,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "kinds": self.kinds(),
            "images": self.images,
            "passed_over": self.passed_over,
            "origin": self.division.origin,
            "classes": list(names),
            "counts": counts,
            "figures": self.figures,
            "repeats": self.repeats,
            "notes": self.notes,
            "skipped": [each.as_dict() for each in self.skipped],
            "findings": [each.as_dict() for each in self.findings],
        }


def sort_findings(findings: list[Finding]) -> list[Finding]:
    """Sort: errors first, then by kind, path and reason, with line 9 before line 10; without repetitions."""
    at = {kind: i for i, kind in enumerate(FINDING_KINDS)}

    def place(each: Finding) -> tuple[bool, int, str, str]:
        return each.severity == "warning", at[each.kind], each.path, _DIGITS.sub(_padded, each.reason)

    return sorted(set(findings), key=place)


def _padded(digits: re.Match[str]) -> str:
    return digits[0].zfill(12)


MAX_SHOWN = 20  # findings of a kind, and classes


def format_report(report: ValidationReport, *, everything: bool = False) -> Iterator[str]:
    """Yield the lines of the report: counts, balance, sizes, then errors and warnings."""
    most = 10**9 if everything else MAX_SHOWN
    yield from _overview(report)
    yield from _classes(report, most)
    yield from _sizes(report.figures)
    if report.notes:
        yield ""
    yield from (f"note: {each}" for each in report.notes)
    if report.skipped:
        yield ""
        yield f"left out ({len(report.skipped):,}), by data.skip_bad:"
        yield from _findings(report.skipped, most)
    for kind, number in report.kinds().items():
        about = FINDING_KINDS[kind]
        yield ""
        yield f"{about.severity}: {about.what} ({number:,}): {about.why}"
        yield from _findings([each for each in report.findings if each.kind == kind], most)
    yield ""
    yield from suggest_fixes(report.findings)
    yield summary_line(report)


def summary_line(report: ValidationReport) -> str:
    """Return the last line: the number of errors and warnings."""
    errors, warnings = report.count("error"), report.count("warning")
    if not errors and not warnings:
        return "nothing wrong was found"
    return f"{_plural(errors, 'error')}, {_plural(warnings, 'warning')}"


def _overview(report: ValidationReport) -> Iterator[str]:
    names = report.division.class_names
    classes = "without labels" if names == ("",) else _plural(len(names), "class")
    size = f", {format_scaled(report.figures['bytes'], 'B')}" if _are_files(report.figures) else ""
    yield f"{report.source}: {_plural(report.images, 'image')}, {classes}{size}"
    yield f"splits   {report.division.origin}"


def _classes(report: ValidationReport, most: int) -> Iterator[str]:
    counts = report.division.counts()
    names = report.division.class_names
    if not names:
        return
    width = max(5, *(len(_short(name)) for name in names[:most]))
    yield ""
    yield f"{'class':<{width}}" + "".join(f"  {split:>9}" for split in counts) + "      share"
    total = max(1, report.images)
    for i, name in enumerate(() if names == ("",) else names[:most]):
        row = [int(found[i]) for found in counts.values()]
        cells = "".join(f"  {format_count(n):>9}" for n in row)
        yield f"{_short(name):<{width}}{cells}  {100 * sum(row) / total:7.1f} %"
    if len(names) > most:
        yield f"and {_plural(len(names) - most, 'class')} more"
    sums = "".join(f"  {format_count(int(found.sum())):>9}" for found in counts.values())
    yield f"{'all':<{width}}{sums}"


def _sizes(figures: dict[str, Any]) -> Iterator[str]:
    if not figures["decoded"]:
        return
    yield ""
    files = _are_files(figures)
    if files:
        yield f"formats  {_counted(figures['formats'])}"
        yield f"modes    {_counted(figures['modes'])}"
    if figures.get("range"):
        yield f"range    {format_range(tuple(figures['range']))}, for images of more than 8 bits"
    for key in ("width", "height"):
        yield f"{key:<8} {_format_spread(figures[key], 'px')}"
    if files:
        size = {key: format_scaled(value, "B") for key, value in figures["file_bytes"].items()}
        yield f"file     {size['smallest']} to {size['largest']}, median {size['median']}"


def _are_files(figures: dict[str, Any]) -> bool:
    """Return whether the images are files, not arrays, whose bytes and mode are those of the pixels."""
    return bool(figures["decoded"]) and set(figures["formats"]) != {"array"}


def _findings(findings: list[Finding], most: int) -> Iterator[str]:
    for each in findings[:most]:
        yield f"  {each.reason}" if each.path == "." else f"  {each.path}: {each.reason}"
    if len(findings) > most:
        yield f"  and {len(findings) - most:,} more; --all shows them"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{word} {number:,}" for word, number in counts.items())


def _format_spread(values: dict[str, int], unit: str) -> str:
    if values["smallest"] == values["largest"]:
        return f"{values['smallest']:,} {unit}"
    return f"{values['smallest']:,} to {values['largest']:,} {unit}, median {values['median']:,}"


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."


def _plural(number: int, word: str) -> str:
    return format_many(number, word, f"{word}es" if word.endswith("ss") else None)


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
    """Yield the sorted positions of equal rows of ``digests`` [N, D], D a multiple of 8."""
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
    """Return findings on classes like "Cat", "cat" and "cat ", or "1", "01" and "1.0"."""
    return [
        Finding("similar-names", group[0], f"classes {', '.join(_distinct(group))}; rename or join them")
        for group in _groups(class_names, lambda name: _NUMBER.sub(r"\1", _plain(name)))
    ]


def _distinct(names: list[str]) -> list[str]:
    r"""Return the names in quotes, with escapes where they differ only in how accents are encoded.

    Example:
        >>> _distinct(["Cat", "cat"]), _distinct(["caf" + chr(0xE9), "cafe" + chr(0x301)])
        (["'Cat'", "'cat'"], ["'caf\\xe9'", "'cafe\\u0301'"])
    """
    same = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
    return [ascii(name) if same else repr(name) for name in names]


def similar_files(names: Iterable[str]) -> list[Finding]:
    """Return findings on files like "a.JPG" and "a.jpg" in the same folder."""
    return [
        Finding(
            "similar-names",
            group[0],
            "on file systems for which these names are equal, one overwrites the other: "
            + ", ".join(_distinct([name.rpartition("/")[2] for name in group])),
            tuple(group[1:]),
        )
        for group in _groups(names, _plain)
    ]


_NUMBER = re.compile(r"^0*(\d+)(?:\.0*)?$")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip()).casefold()


def _groups(names: Iterable[str], plain: Callable[[str], str]) -> list[list[str]]:
    first: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name in names:
        folder, slash, own = name.rpartition("/")
        key = folder + slash + plain(own)
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
    """Return the value range of a data set by the setting ``data.range``, and findings on it."""
    good = table.good
    wide = good[table.rows["span"][good] > 0]
    if not len(wide):
        return (None if setting == "auto" else setting), _check_low_contrast(table.rows[good], (0.0, 255.0))
    spans = {i: span for i in wide.tolist() if (span := table.span(i)) is not None}
    train = set(np.flatnonzero(division.splits == SPLITS.index("train")).tolist())
    found = compute_range(span for i, span in spans.items() if i in train) or compute_range(spans.values())
    ends = found if setting == "auto" else setting
    findings = _check_mixed(len(good), spans)
    for i, span in spans.items():
        findings += _check_span(names[i], span, _FULL if span.kind == "colour" or ends is None else ends)
    if len(wide) == len(good) and ends is not None and not findings:
        findings = _check_low_contrast(table.rows[good], ends)
    return ends, findings


def _check_low_contrast(rows: NDArray[Any], ends: ValueRange) -> list[Finding]:
    """Return a finding if nearly all images use the same small part of the range, such as thermal images in kelvin."""
    if (band := narrow_band(rows["low"], rows["high"], ends)) is None:
        return []
    low, high = band
    way = (
        "scale the values in the files to 0 to 255" if ends == (0, 255) else f"set data.range=[{low:.10g},{high:.10g}]"
    )
    reason = (
        f"the values of nearly all images lie between {low:.6g} and {high:.6g}, and the range is {format_range(ends)}"
    )
    return [Finding("low-contrast", ".", f"{reason}: {way}")]


def narrow_band(lows: ArrayLike, highs: ArrayLike, ends: ValueRange) -> ValueRange | None:
    """Return the band of all but 5 % of the images at each end, if it is less than 1/8 of the range; else None.

    Example:
        >>> lows, highs = np.zeros(20), np.full(20, 15)
        >>> highs[7] = 255  # one bright image of twenty
        >>> narrow_band(lows, highs, (0, 255)), narrow_band(lows, highs, (0, 127)), narrow_band(lows, highs, (0, 119))
        ((0.0, 15.0), (0.0, 15.0), None)
    """
    dark, bright = np.sort(lows), np.sort(highs)
    if not len(dark):
        return None
    left = len(dark) // 20
    low, high = float(dark[left]), float(bright[-1 - left])
    return None if (high - low) * NARROW >= ends[1] - ends[0] else (low, high)


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
