"""Images of more than 8 bits, and the one range by which a run would read them."""

from typing import Literal

import numpy as np

from potstill.data.doctor.division import Division
from potstill.data.doctor.findings import Finding
from potstill.data.doctor.statistics import Table
from potstill.data.splits import SPLITS
from potstill.data.value_range import Range, Span, data_range, shown

NARROW = 8  # an image that uses less than 1/8 of the range shows less than 5 of 8 bits
_FULL: Range = (0.0, 65535.0)  # of 16-bit colours, of which the high byte is read


def examine_ranges(
    names: list[str], division: Division, table: Table, wanted: Range | Literal["auto"]
) -> tuple[Range | None, list[Finding]]:
    """The range of a data set, and what is odd about it.

    Args:
        names: [N] of the images.
        division: of them.
        table: of what was seen of them.
        wanted: the setting ``data.range``.
    """
    good = table.good
    wide = good[table.rows["span"][good] > 0]
    if not len(wide):
        return (None if wanted == "auto" else wanted), []
    spans = {i: span for i in wide.tolist() if (span := table.span(i)) is not None}
    train = set(np.flatnonzero(division.splits == SPLITS.index("train")).tolist())
    found = data_range(span for i, span in spans.items() if i in train) or data_range(spans.values())
    ends = found if wanted == "auto" else wanted
    findings = _mixed(len(good), spans)
    for i, span in spans.items():
        findings += _one(names[i], span, _FULL if span.kind == "colour" or ends is None else ends)
    return ends, findings


def _one(name: str, span: Span, ends: Range) -> list[Finding]:
    low, high = ends
    what = f"values from {span.low:.6g} to {span.high:.6g}"
    if span.kind != "colour" and (span.low < low or span.high > high):
        return [Finding("beyond-range", name, f"{what}, the range is {shown(ends)}")]
    if span.high - low < (high - low + (span.kind == "integer")) / NARROW and high - low > 255:
        return [Finding("narrow-range", name, f"{what}, the range is {shown(ends)}")]
    if span.kind == "float" and span.high - low < (high - low) / NARROW:
        return [Finding("narrow-range", name, f"{what}, the range is {shown(ends)}")]
    return []


def _mixed(images: int, spans: dict[int, Span]) -> list[Finding]:
    """Images of different kinds under one range."""
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
