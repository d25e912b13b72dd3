"""Validation of a data set (``potstill check``): every problem, each with path and reason.

Here the report: image statistics and sorted findings, as JSON and as text (not escaped yet).
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.entries import FINDING_KINDS, Finding, Severity, suggest_fixes
from potstill.data.image_io import SPAN_KINDS, ValueSpan, format_range
from potstill.data.scan import ImageScan
from potstill.data.splits import SplitAssignment
from potstill.formatting import format_count, format_scaled

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
    return (0, 0.0, 0.0) if scan.span is None else (SPAN_KINDS.index(scan.span.kind) + 1, scan.span.low, scan.span.high)


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
    """Yield the lines of the report: counts, balance, sizes, then errors and warnings.

    Args:
        report: what was found.
        everything: all findings and classes, rather than the first twenty of each kind.
    """
    most = 10**9 if everything else MAX_SHOWN
    yield from _overview(report)
    yield from _classes(report, most)
    yield from _sizes(report.figures)
    if report.notes:
        yield ""
    yield from (f"note: {each}" for each in report.notes)
    if report.skipped:
        yield ""
        yield f"left out ({len(report.skipped):,}), as data.skip_bad asks:"
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
    for i, name in enumerate(names[:most]):
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
    return set(figures["formats"]) != {"array"}


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
    ending = "" if number == 1 else "es" if word.endswith("ss") else "s"
    return f"{number:,} {word}{ending}"
