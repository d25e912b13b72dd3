"""The sentences around the verdict's headline: each is "" where its figures are missing."""

from collections.abc import Mapping
from typing import Any, Literal

from potstill.amounts import duration, percent, points
from potstill.experiments.stage_names import in_order, role
from potstill.experiments.verdict.several_seeds import figure, several

Finding = Literal["helped", "hurt", "unclear", "one_seed", "unknown"]
MOST_NAMED = 5  # classes


def doubts(stages: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[str]:
    """What makes the figures void, the worst first: a network at chance, classes that one never predicts, and a
    teacher that is below the baseline on val.
    """
    tests = {name: (stages.get(name) or {}).get("test") or {} for name in in_order(stages)}
    judged = {name: test for name, test in tests.items() if role(name) in ("teacher", "baseline", "distilled")}
    at_chance = [name for name, test in judged.items() if test.get("at_chance")]
    said = [
        f"The {_named(name)} is not clearly better than chance on test: top-1 "
        f"{percent(judged[name].get('top1'))}, where always "
        f"predicting the most frequent class gives {percent(judged[name].get('largest_class'))}; "
        + ("the distilled student had nothing to learn from it." if role(name) == "teacher" else "it has not learned.")
        for name in at_chance
    ]
    for name, test in judged.items():
        missing = [] if name in at_chance else list(test.get("never_predicted") or [])
        if missing:
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            listed = ", ".join(map(str, missing[:MOST_NAMED])) + more
            classes = "one class" if len(missing) == 1 else f"{len(missing)} classes"
            said.append(f"The {_named(name)} never predicts {classes} of the test split: {listed}.")
    for each in comparison.get("teacher_below_baseline") or []:
        if each.get("teacher") not in at_chance:
            top1 = f"{percent(each.get('teacher_val_top1'))} against {percent(each.get('baseline_val_top1'))}"
            said.append(
                f"The {each.get('teacher')} is below the baseline on val (top-1 {top1}): train it longer or give a "
                "better one."
            )
    said += [f"{str(each).rstrip('.')}." for each in comparison.get("views_differ") or []]
    return said


def _named(stage: str) -> str:
    return "distilled student" if stage == "distilled" else stage


def percent_of(confidence: float) -> str:
    """``95 %``, ``99.75 %``."""
    return f"{100 * confidence:.4g} %"


def accuracies(stages: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """Top-1 of every stage on test, and of several teachers together."""
    top1 = ((several(comparison) or {}).get("figures") or {}).get("top1") or {}
    means = {"baseline": figure(top1, "mean_a"), "distilled": figure(top1, "mean_b")}
    said = []
    for name in in_order(stages):
        share = means.get(name)
        if share is None:
            share = figure((stages.get(name) or {}).get("test"), "top1")
        if share is not None:
            said.append(f"{name} {100 * share:.1f} %")
    together = figure(comparison, "teachers_top1")
    if said and together is not None and (figure(comparison, "teachers") or 0) > 1:
        said.append(f"the teachers together {100 * together:.1f} %")
    mean = " (baseline and distilled: mean over the seeds)" if means["baseline"] is not None else ""
    where = "the target's test" if comparison.get("domain") else "test"
    return f"Top-1 on {where}: {', '.join(said)}{mean}." if len(said) > 1 else ""


def gap(comparison: Mapping[str, Any], found: Finding) -> str:
    """How far the teacher leads, and how much of that the student has made up."""
    gap, closed = figure(comparison, "gap"), figure(comparison, "gap_closed")
    if gap is None:
        return ""
    several = (figure(comparison, "teachers") or 1) > 1
    if gap <= 0:
        how = "no better than" if gap == 0 else f"{points(-gap, signed=False)} points worse than"
        who = "The teachers together are" if several else "The teacher is"
        return f"{who} {how} the baseline, so there was no gap to close: a better teacher comes first."
    who = "The teachers together lead" if several else "The teacher leads"
    lead = f"{who} the baseline by {points(gap, signed=False)} points"
    low, high = figure(comparison, "gap_low"), figure(comparison, "gap_high")
    if low is not None and high is not None and figure(comparison, "gap_closed_low") is None:
        return f"{lead}, which may be sampling noise in the test set (95 % interval {points(low)} to {points(high)})."
    if found == "one_seed":
        if closed is None or closed <= 0:
            return f"{lead}."
        return f"{lead}; on this seed the distilled student closed {_share(closed)} of this gap{_ends(comparison)}."
    if found == "unclear":
        what = "this test split" if figure(comparison, "seeds_count") is None else "these seeds and this test split"
        return f"{lead}; {what} cannot tell how much of that gap distillation closed."
    if found == "hurt":
        return f"{lead}; distillation did not close this gap but widened it."
    if closed is None or closed <= 0:
        return f"{lead}."
    return f"{lead}; the distilled student closed {_share(closed)} of this gap{_ends(comparison)}."


def _share(closed: float) -> str:
    return "all" if closed >= 1 else f"{100 * closed:.0f} %"


def _ends(comparison: Mapping[str, Any]) -> str:
    low, high = figure(comparison, "gap_closed_low"), figure(comparison, "gap_closed_high")
    return "" if low is None or high is None else f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def cost(comparison: Mapping[str, Any]) -> str:
    """How much smaller and faster the student is.

    Ratios are teacher to student: 12.3 means that the teacher has 12.3 times as many.
    """
    small, fast = figure(comparison, "parameter_ratio"), figure(comparison, "latency_ratio")
    size, speed = _ratio(small, "smaller", "larger"), _ratio(fast, "faster", "slower")
    said = [text for text in (size and f"{size} in parameters", speed and f"{speed} for one image") if text]
    several = (figure(comparison, "teachers") or 1) > 1
    return f"Against the teacher{'s together' if several else ''}, the student is {' and '.join(said)}." if said else ""


def time(stages: Mapping[str, Any]) -> str:
    """What distillation took beyond training the baseline: the teachers' training too, where it was done here."""
    taken = {name: figure((stages[name] or {}).get("training"), "seconds") for name in in_order(stages)}
    baseline, distilled = taken.get("baseline"), taken.get("distilled")
    if baseline is None or distilled is None:
        return ""
    others = {name: seconds for name, seconds in taken.items() if name not in ("baseline", "distilled")}
    parts = [f"{name} {'ready-made' if seconds is None else duration(seconds)}" for name, seconds in others.items()]
    parts += [f"distilled {duration(distilled)}", f"baseline {duration(baseline)}"]
    more = sum(seconds or 0.0 for seconds in others.values()) + distilled - baseline
    cost = f"{duration(more)} more training than the baseline alone" if more > 0 else "no more training time"
    return f"It cost {cost} ({', '.join(parts)})."


def limits(comparison: Mapping[str, Any]) -> str:
    """What the figures above cannot tell."""
    seeds = several(comparison)
    if seeds is None:
        return (
            "One seed cannot separate what distillation does from what another seed would do: the interval covers the "
            "choice of test images only (--resume --seeds 5 goes on from here)."
        )
    said = []
    looks = figure(seeds.get("top1_gain"), "looks") or 1
    if looks > 1:
        said.append(
            f"This is look {looks:.0f} at the test split, so the interval is wider than 95 %: seeds or epochs that are "
            "added after a look give chance another try."
        )
    if figure(comparison.get("looks"), "augmentation_seeds") == 1:
        said.append("All seeds saw the same augmented views: what other views would give is not covered either.")
    if figure(comparison, "teachers"):
        said.append("All seeds learn from the same teacher: another teacher is not covered by the interval.")
    return " ".join(said)


def _ratio(ratio: float | None, more: str, less: str) -> str:
    if ratio is None or ratio <= 0:
        return ""
    if 0.95 < ratio < 1.05:
        return f"neither {more} nor {less}"
    word, factor = (more, ratio) if ratio > 1 else (less, 1 / ratio)
    return f"{factor:.1f} times {word}" if factor < 100 else f"{factor:,.0f} times {word}"


def on_images(comparison: Mapping[str, Any]) -> str:
    """``270 test images``, "of the target" where there is one."""
    count, whose = figure(comparison, "test_images"), " of the target" if comparison.get("domain") else ""
    if count is None:
        return f"the test images{whose}"
    return f"1 test image{whose}" if count == 1 else f"{count:,.0f} test images{whose}"
