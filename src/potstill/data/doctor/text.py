"""The report as lines for people; nothing in them is escaped yet."""

from collections.abc import Iterator
from typing import Any

from potstill.amounts import count, scaled
from potstill.data.doctor.findings import KINDS, Finding, hints
from potstill.data.doctor.report import Report
from potstill.data.value_range import shown

SHOWN = 20  # findings of a kind, and classes


def lines(report: Report, *, everything: bool = False) -> Iterator[str]:
    """Counts, balance, sizes, then errors and warnings.

    Args:
        report: what was found.
        everything: all findings and classes, rather than the first twenty of each kind.
    """
    most = 10**9 if everything else SHOWN
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
        about = KINDS[kind]
        yield ""
        yield f"{about.severity}: {about.what} ({number:,}): {about.why}"
        yield from _findings([each for each in report.findings if each.kind == kind], most)
    yield ""
    yield from hints(report.findings)
    yield verdict(report)


def verdict(report: Report) -> str:
    """The last line: how many errors and warnings."""
    errors, warnings = report.count("error"), report.count("warning")
    if not errors and not warnings:
        return "nothing wrong was found"
    return f"{_plural(errors, 'error')}, {_plural(warnings, 'warning')}"


def _overview(report: Report) -> Iterator[str]:
    names = report.division.class_names
    size = f", {scaled(report.figures['bytes'], 'B')}" if _are_files(report.figures) else ""
    yield f"{report.source}: {_plural(report.images, 'image')}, {_plural(len(names), 'class')}{size}"
    yield f"splits   {report.division.origin}"


def _classes(report: Report, most: int) -> Iterator[str]:
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
        cells = "".join(f"  {count(n):>9}" for n in row)
        yield f"{_short(name):<{width}}{cells}  {100 * sum(row) / total:7.1f} %"
    if len(names) > most:
        yield f"and {_plural(len(names) - most, 'class')} more"
    sums = "".join(f"  {count(int(found.sum())):>9}" for found in counts.values())
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
        yield f"range    {shown(tuple(figures['range']))}, for images of more than 8 bits"
    for key in ("width", "height"):
        yield f"{key:<8} {_spread(figures[key], 'px')}"
    if files:
        size = {key: scaled(value, "B") for key, value in figures["file_bytes"].items()}
        yield f"file     {size['smallest']} to {size['largest']}, median {size['median']}"


def _are_files(figures: dict[str, Any]) -> bool:
    """Rather than arrays, whose bytes and mode are those of the decoded pixels."""
    return set(figures["formats"]) != {"array"}


def _findings(findings: list[Finding], most: int) -> Iterator[str]:
    for each in findings[:most]:
        yield f"  {each.reason}" if each.path == "." else f"  {each.path}: {each.reason}"
    if len(findings) > most:
        yield f"  and {len(findings) - most:,} more; --all shows them"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{word} {number:,}" for word, number in counts.items())


def _spread(values: dict[str, int], unit: str) -> str:
    if values["smallest"] == values["largest"]:
        return f"{values['smallest']:,} {unit}"
    return f"{values['smallest']:,} to {values['largest']:,} {unit}, median {values['median']:,}"


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."


def _plural(number: int, word: str) -> str:
    ending = "" if number == 1 else "es" if word.endswith("ss") else "s"
    return f"{number:,} {word}{ending}"
