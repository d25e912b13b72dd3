"""Did distillation help, by how much, and at what price."""

from typing import Any

from potstill.amounts import count, decimal, number, points, ratio
from potstill.experiments.verdict.sentences import percent_of
from potstill.experiments.verdict.several_seeds import over_all_seeds
from potstill.experiments.verdict.verdict import finding, sentences
from potstill.report.contents import Run

MARKS = {
    "helped": "Distillation helped",
    "hurt": "Distillation hurt",
    "unclear": "No clear difference",
    "one_seed": "One seed: no verdict",
}


def context(run: Run) -> dict[str, Any] | None:
    """Sentences, facts and the intervals on a number line."""
    comparison = run.comparison
    headline, *others = sentences(comparison, run.results.get("stages"))
    found = finding(comparison)
    whole = over_all_seeds(comparison) if comparison else {}
    return {
        "finding": found,
        "mark": MARKS.get(found, "Nothing to compare"),
        "headline": headline,
        "sentences": others,
        "facts": _facts(whole, found) if comparison else [],
        "lines": [interval_line(whole)] if found != "unknown" else [],
    }


def interval_line(whole: dict[str, Any]) -> dict[str, Any]:
    """Where 0, gain and interval lie on a line from 0 to 100, with its label."""
    gain, low, high = (float(whole[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    left, right = min(0.0, low), max(0.0, high)
    room = 0.12 * (right - left) or 0.01
    left, right = left - room, right + room

    def place(value: float) -> float:
        return round(100 * (value - left) / (right - left), 2)

    return {
        "zero": place(0.0),
        "low": place(low),
        "gain": place(gain),
        "width": round(place(high) - place(low), 2),
        "label": f"{points(gain)} points, {_interval(whole, low, high)}",
    }


def _interval(whole: dict[str, Any], low: float, high: float) -> str:
    confidence = number(whole.get("confidence"))
    over = "test images only" if confidence is None else "seeds and test images"
    return f"{percent_of(confidence or 0.95)} interval {points(low)} to {points(high)} over {over}"


def _facts(whole: dict[str, Any], found: str) -> list[tuple[str, str, str]]:
    """(value, what it is, more)."""
    facts = []
    gain, low, high = (number(whole.get(f"top1_gain{end}")) for end in ("", "_low", "_high"))
    seeds = number(whole.get("seeds_count"))
    if gain is not None:
        more = _interval(whole, low, high) if low is not None and high is not None else ""
        facts.append((points(gain), "points of top-1, distilled − baseline", more))
    if seeds is not None:
        p = number(whole.get("p"))
        more = "" if p is None else f"test over seeds and images: p = {decimal(p, 3)}"
        facts.append((count(seeds), "seeds, all with the same teacher", more))
    elif number(whole.get("fixed")) is not None:
        p = number(whole.get("mcnemar_p"))
        changed = f"{count(whole['fixed'])} / {count(whole.get('broken'))}"
        more = "" if p is None else f"McNemar's exact test: p = {decimal(p, 3)}"
        facts.append((changed, "test images newly right / newly wrong", more))
    facts += _gap_facts(whole, found)
    for key, what in (
        ("parameter_ratio", "parameters, teacher : student"),
        ("file_ratio", "file size, teacher : student"),
        ("latency_ratio", "latency p50, teacher : student"),
    ):
        if number(whole.get(key)) is not None:
            facts.append((ratio(whole[key]), what, ""))
    return facts


def _gap_facts(whole: dict[str, Any], found: str) -> list[tuple[str, str, str]]:
    gap, closed = number(whole.get("gap")), number(whole.get("gap_closed"))
    if gap is None:
        return []
    low, high = number(whole.get("gap_low")), number(whole.get("gap_high"))
    more = "" if low is None or high is None else f"95 % interval {points(low)} to {points(high)}"
    facts = [(points(gap), "points of top-1, teacher − baseline", more if gap > 0 else "no gap to close")]
    share_low, share_high = number(whole.get("gap_closed_low")), number(whole.get("gap_closed_high"))
    sure = low is None or share_low is not None
    if gap > 0 and sure and closed is not None and found == "helped":
        known = closed < 1 and share_low is not None and share_high is not None
        more = f"95 % interval {100 * (share_low or 0):.0f} to {100 * (share_high or 0):.0f} %" if known else ""
        facts.append((f"{100 * closed:.0f} %" if closed < 1 else "all", "of the gap to the teacher closed", more))
    return facts
