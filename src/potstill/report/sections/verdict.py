"""Did distillation help, by how much, and at what price."""

from typing import Any

from potstill.amounts import count, decimal, number, ratio
from potstill.experiments.verdict import finding, points, sentences
from potstill.report.contents import Run

MARKS = {"helped": "Distillation helped", "hurt": "Distillation hurt", "unclear": "No clear difference"}


def context(run: Run) -> dict[str, Any] | None:
    """Sentences, facts and the interval on a number line."""
    comparison = run.comparison
    headline, *others = sentences(comparison, run.results.get("stages"))
    found = finding(comparison)
    return {
        "finding": found,
        "mark": MARKS.get(found, "Nothing to compare"),
        "headline": headline,
        "sentences": others,
        "facts": _facts(comparison, found) if comparison else [],
        "line": interval_line(comparison) if comparison and found != "unknown" else None,
    }


def interval_line(comparison: dict[str, Any]) -> dict[str, Any]:
    """Where 0, gain and interval lie on a line from 0 to 100, with their labels."""
    low, gain, high = (float(comparison[key]) for key in ("top1_gain_low", "top1_gain", "top1_gain_high"))
    left, right = min(low, 0.0), max(high, 0.0)
    room = 0.12 * (right - left) or 0.01
    left, right = left - room, right + room

    def place(value: float) -> float:
        return round(100 * (value - left) / (right - left), 2)

    return {
        "zero": place(0.0),
        "low": place(low),
        "gain": place(gain),
        "width": round(place(high) - place(low), 2),
        "label": f"{points(gain)} points, 95 % interval {points(low)} to {points(high)}",
    }


def _facts(comparison: dict[str, Any], found: str) -> list[tuple[str, str, str]]:
    """(value, what it is, more)."""
    facts = []
    gain, low, high = (number(comparison.get(f"top1_gain{end}")) for end in ("", "_low", "_high"))
    if gain is not None:
        more = f"95 % interval {points(low)} to {points(high)}" if low is not None and high is not None else ""
        facts.append((points(gain), "points of top-1, distilled − baseline", more))
    if number(comparison.get("fixed")) is not None:
        p = number(comparison.get("mcnemar_p"))
        changed = f"{count(comparison['fixed'])} / {count(comparison.get('broken'))}"
        facts.append(
            (
                changed,
                "test images repaired / broken",
                "" if p is None else f"McNemar's exact test: p = {decimal(p, 3)}",
            )
        )
    facts += _gap_facts(comparison, found)
    for key, what in (
        ("parameter_ratio", "parameters, teacher : student"),
        ("latency_ratio", "latency p50, teacher : student"),
    ):
        if number(comparison.get(key)) is not None:
            facts.append((ratio(comparison[key]), what, ""))
    return facts


def _gap_facts(comparison: dict[str, Any], found: str) -> list[tuple[str, str, str]]:
    gap, closed = number(comparison.get("gap")), number(comparison.get("gap_closed"))
    if gap is None:
        return []
    facts = [(points(gap), "points of top-1, teacher − baseline", "" if gap > 0 else "no gap to close")]
    if gap > 0 and closed is not None and found == "helped":
        facts.append((f"{100 * closed:.0f} %", "of the gap to the teacher closed", ""))
    return facts
