"""``comparison`` of results.json: the distilled student against the baseline on the same test images, by every seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from potstill.evaluation.averages import Array
from potstill.evaluation.significance import (
    crossed_interval,
    gap_closed,
    look_confidence,
    mcnemar,
    paired_interval,
    seeds_summary,
)
from potstill.experiments.groups import members
from potstill.experiments.stage_names import in_order, numbered, role
from potstill.experiments.verdict.several_seeds import FEWEST, figure
from potstill.experiments.verdict.verdict import verdict

OVER_SEEDS = ("top1", "top3", "f1_macro", "auc_macro", "ece", "nll")  # figures that are averaged over the seeds
_BETWEEN = ("assistant", "generation")  # stages on the way to the distilled student


def compare(
    stages: dict[str, Any],
    correct: dict[str, Array],
    groups: dict[str, Any] | None = None,
    repeats: Mapping[str, Any] | None = None,
    seed: int = 0,
    domain: Mapping[str, Any] | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that sets distilled and baseline side by side.

    Args:
        stages: of results.json, with baseline and distilled; with teachers where there are any.
        correct: stage, repeat or group -> [N] bool, whether each test image was classified correctly.
        groups: ``together`` of results.json.
        repeats: of results.json: baseline and distilled of further seeds.
        seed: the first one.
        domain: what ``domain_results.describe_domains`` says, where there is a target.
        known: further facts for the verdict: ``looks`` and ``teacher_below_baseline``, as in results.json.
    """
    groups = groups or {}
    baseline, distilled = (stages[name]["test"] for name in ("baseline", "distilled"))
    gained = _gain(correct["baseline"], correct["distilled"])
    others = [name for name in (*in_order(stages), *groups) if name == "generations" or role(name) in _BETWEEN]
    teacher = _of_teachers(correct, members("teachers", stages))
    comparison = {
        **gained,
        "f1_macro_gain": distilled["f1_macro"] - baseline["f1_macro"],
        "auc_macro_gain": _difference(distilled["auc_macro"], baseline["auc_macro"]),
        **_against_teachers(stages, groups, gained["top1_gain"]),
        **_sure_of_gap(teacher, correct["baseline"][None], correct["distilled"][None]),
        "test_images": len(correct["baseline"]),
        "others": {name: _gain(correct["baseline"], correct[name]) for name in others},
    }
    if repeats:
        comparison["seeds"] = _over_seeds(stages | dict(repeats), correct, teacher, seed, looks(known))
    if domain is not None:
        comparison["domain"] = dict(domain)
    comparison |= known or {}
    return comparison | {"verdict": verdict(comparison, stages)}


def looks(known: Mapping[str, Any] | None) -> int:
    """How many times a verdict could be read from the test split, the present one included.

    A first look at fewer seeds than a verdict takes does not count: none could be read there.
    """
    found = (known or {}).get("looks") or {}
    evaluations = int(figure(found, "test_evaluations") or 1)
    first = figure(found, "seeds_at_first_look")
    return max(1, evaluations - (evaluations > 1 and first is not None and first < FEWEST))


def _over_seeds(
    stages: Mapping[str, Any], correct: Mapping[str, Array], teacher: Array | None, seed: int, looks: int
) -> dict[str, Any]:
    """The same over all seeds: by seed, their means, and the mean gain with one interval over seeds and images."""
    count = 1
    while {numbered("baseline", count + 1), numbered("distilled", count + 1)} <= stages.keys():
        count += 1
    pairs = [(numbered("baseline", each), numbered("distilled", each)) for each in range(1, count + 1)]
    before, after = (np.stack([correct[pair[at]] for pair in pairs]) for at in (0, 1))
    whole = crossed_interval(before, after, look_confidence(looks))
    tests = [[stages[name]["test"] for name in pair] for pair in pairs]
    figures = {}
    for key in OVER_SEEDS:
        columns: list[list[float]] = [
            [pair[at][key] for pair in tests if pair[at].get(key) is not None] for at in (0, 1)
        ]
        if len(columns[0]) == len(columns[1]) == count:
            figures[key] = seeds_summary(*columns)
    found = {
        "seeds": list(range(seed, seed + count)),
        "each": [{"seed": seed + at, **_gain(before[at], after[at])} for at in range(count)],
        "figures": figures,
        "top1_gain": {**whole._asdict(), "looks": looks},
    }
    if teacher is not None:
        lead = float(teacher.mean() - before.mean())
        found |= {"gap": lead, "gap_closed": whole.value / lead if lead > 0 else None}
        found |= _sure_of_gap(teacher, before, after)
    return found


def _gain(before: Array, after: Array) -> dict[str, Any]:
    gain, low, high = paired_interval(before, after)
    test = mcnemar(before, after)
    return {
        "top1_gain": gain,
        "top1_gain_low": low,
        "top1_gain_high": high,
        "mcnemar_p": test["p"],
        "fixed": test["fixed"],
        "broken": test["broken"],
    }


def _of_teachers(correct: Mapping[str, Array], names: Sequence[str]) -> Array | None:
    """[N] bool of the teacher, or of several together; None where there is none, or only their figures are known."""
    if len(names) == 1:
        return correct.get(names[0])
    return correct.get("teachers") if names else None


def _sure_of_gap(teacher: Array | None, baseline: Array, distilled: Array) -> dict[str, float]:
    """Ends of the intervals; those of the share that is closed only where there surely is a gap."""
    if teacher is None:
        return {}
    gap, closed = gap_closed(teacher, baseline, distilled)
    ends = {"gap_low": gap.low, "gap_high": gap.high}
    return ends if closed is None else ends | {"gap_closed_low": closed.low, "gap_closed_high": closed.high}


def _against_teachers(stages: dict[str, Any], groups: dict[str, Any], gain: float) -> dict[str, Any]:
    """How far the teacher, or the teachers together, lead, and what they cost beside the student."""
    names, student = members("teachers", stages), stages["distilled"]
    if not names:
        return {"teachers": 0, "gap": None, "gap_closed": None}
    reached = groups.get("teachers", stages[names[0]])["test"]["top1"]
    lead = reached - stages["baseline"]["test"]["top1"]
    sums = {
        "parameter_ratio": ("model", "parameters"),
        "file_ratio": ("model", "file_bytes"),
        "latency_ratio": ("latency_ms", "p50"),
    }
    return {
        "teachers": len(names),
        "teachers_top1": reached,
        "gap": lead,
        "gap_closed": gain / lead if lead > 0 else None,
        **{
            name: sum(stages[teacher][part][key] for teacher in names) / student[part][key]
            for name, (part, key) in sums.items()
        },
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
