"""Distilled student against baseline, for results.json."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from potstill.config import sort_stages, stage_name, stage_role
from potstill.evaluation import Array
from potstill.evaluation.significance import (
    crossed_interval,
    gap_closed,
    interim_confidence,
    mcnemar,
    paired_interval,
    seeds_summary,
    wilson_interval,
)
from potstill.experiment.ensembles import group_members
from potstill.experiment.verdict import MIN_SEEDS, finite_figure, verdict

SEED_METRICS = ("top1", "top3", "f1_macro", "auc_macro", "ece", "nll")  # averaged over the seeds
_INTERMEDIATE_ROLES = ("assistant", "generation")


def compare_with_baseline(
    stages: dict[str, Any],
    correct: dict[str, Array],
    groups: dict[str, Any] | None = None,
    repeats: Mapping[str, Any] | None = None,
    seed: int = 0,
    domain: Mapping[str, Any] | None = None,
    known: Mapping[str, Any] | None = None,
    folds: Array | None = None,
) -> dict[str, Any]:
    """Return ``comparison`` of results.json.

    ``correct``: stage, repeat or group -> [N] bool.  ``known``: facts for the verdict: ``test_evaluations`` and
    ``teacher_below_baseline``.  ``folds``: [N] fold of each image, whose models have predicted it; None: the same for
    all.
    """
    groups = groups or {}
    baseline, distilled = (stages[name]["test"] for name in ("baseline", "distilled"))
    gained, aucs = _gain(correct["baseline"], correct["distilled"]), (baseline["auc_macro"], distilled["auc_macro"])
    others = [
        name
        for name in (*sort_stages(stages), *groups)
        if name == "generations" or stage_role(name) in _INTERMEDIATE_ROLES
    ]
    teacher = _teacher_correct(correct, group_members("teachers", stages))
    comparison = {
        **gained,
        "f1_macro_gain": distilled["f1_macro"] - baseline["f1_macro"],
        "auc_macro_gain": None if None in aucs else aucs[1] - aucs[0],
        **_compare_with_teachers(stages, groups, gained["top1_gain"]),
        **_gap_intervals(teacher, correct["baseline"][None], correct["distilled"][None], folds),
        "test_images": len(correct["baseline"]),
        "others": {name: _gain(correct["baseline"], correct[name]) for name in others},
    }
    if folds is not None:
        looks = int(finite_figure((known or {}).get("looks"), "test_evaluations") or 1)
        comparison["folds"] = _over_folds(correct, teacher, folds, looks)
    elif repeats:
        comparison["seeds"] = _over_seeds(stages | dict(repeats), correct, teacher, seed, count_test_evaluations(known))
    if domain is not None:
        comparison["domain"] = dict(domain)
    comparison |= known or {}
    return comparison | {"verdict": verdict(comparison, stages)}


def count_test_evaluations(known: Mapping[str, Any] | None) -> int:
    """Return the number of test evaluations that could give a verdict, this one included: with enough seeds for one."""
    found = (known or {}).get("looks") or {}
    evaluations = int(finite_figure(found, "test_evaluations") or 1)
    first = finite_figure(found, "seeds_at_first_look")
    return max(1, evaluations - (evaluations > 1 and first is not None and first < MIN_SEEDS))


def _over_seeds(
    stages: Mapping[str, Any], correct: Mapping[str, Array], teacher: Array | None, seed: int, looks: int
) -> dict[str, Any]:
    """Return the comparison over all seeds: each seed, and the mean gain with its interval over seeds and images."""
    pairs = _pairs(stages)
    count = len(pairs)
    before, after = (np.stack([correct[pair[at]] for pair in pairs]) for at in (0, 1))
    whole = crossed_interval(before, after, interim_confidence(looks))
    tests = [[stages[name]["test"] for name in pair] for pair in pairs]
    figures = {}
    for key in SEED_METRICS:
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
    return found | _gap_over(teacher, before, after, whole.value)


def _over_folds(correct: Mapping[str, Array], teacher: Array | None, folds: Array, looks: int) -> dict[str, Any]:
    """Return the comparison over all folds and seeds: each fold, and the mean gain with its interval."""
    pairs = _pairs(correct)
    before, after = (np.stack([correct[pair[at]] for pair in pairs]) for at in (0, 1))
    whole = crossed_interval(before, after, interim_confidence(looks), folds)
    count = int(folds.max()) + 1
    own = [folds == fold for fold in range(count)]
    figures = seeds_summary(
        *([float(each[:, images].mean()) for images in own] for each in (before, after)), folds=True
    )
    found = {
        "folds": count,
        "seeds": len(pairs),
        "each": [
            {
                "fold": fold + 1,
                "images": int(images.sum()),
                "top1_gain": float((after - before * 1.0)[:, images].mean()),
            }
            for fold, images in enumerate(own)
        ],
        "figures": {"top1": figures},
        "top1": {"baseline": float(before.mean()), "distilled": float(after.mean())},  # over all images and seeds
        "top1_gain": {**whole._asdict(), "looks": looks},
    }
    return found | _gap_over(teacher, before, after, whole.value, folds)


def _pairs(stages: Collection[str]) -> list[tuple[str, str]]:
    found = [("baseline", "distilled")]
    while {*(further := tuple(stage_name(role, len(found) + 1) for role in found[0]))} <= set(stages):
        found.append((further[0], further[1]))
    return found


def _gap_over(
    teacher: Array | None, before: Array, after: Array, gain: float, folds: Array | None = None
) -> dict[str, Any]:
    """Return the gap to the teacher and the share of it that was closed, over all seeds, with their intervals."""
    if teacher is None:
        return {}
    return _gap(float(teacher.mean() - before.mean()), gain) | _gap_intervals(teacher, before, after, folds)


def _gap(lead: float, gain: float) -> dict[str, Any]:
    return {"gap": lead, "gap_closed": gain / lead if lead > 0 else None}


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


def _teacher_correct(correct: Mapping[str, Array], names: Sequence[str]) -> Array | None:
    """Return [N] bool of the teacher, or of the ensemble of teachers; None if unknown."""
    if len(names) == 1:
        return correct.get(names[0])
    return correct.get("teachers") if names else None


def _gap_intervals(
    teacher: Array | None, baseline: Array, distilled: Array, folds: Array | None = None
) -> dict[str, float]:
    """Return the intervals of the gap and, if the gap is significant, of its closed share."""
    if teacher is None:
        return {}
    gap, closed = gap_closed(teacher, baseline, distilled, folds)
    ends = {"gap_low": gap.low, "gap_high": gap.high}
    return ends if closed is None else ends | {"gap_closed_low": closed.low, "gap_closed_high": closed.high}


def _compare_with_teachers(stages: dict[str, Any], groups: dict[str, Any], gain: float) -> dict[str, Any]:
    """Return the lead of the teachers over the baseline, and their cost relative to the student's."""
    names, student = group_members("teachers", stages), stages["distilled"]
    if not names:
        return {"teachers": 0, "gap": None, "gap_closed": None}
    top1 = groups.get("teachers", stages[names[0]])["test"]["top1"]
    lead = top1 - stages["baseline"]["test"]["top1"]
    sums = {
        "parameter_ratio": ("model", "parameters"),
        "file_ratio": ("model", "file_bytes"),
        "latency_ratio": ("latency_ms", "p50"),
    }
    ratios = {}
    for name, (part, key) in sums.items():
        costs = [cost for teacher in names if (cost := (stages[teacher][part] or {}).get(key)) is not None]
        ratios[name] = sum(costs) / student[part][key] if len(costs) == len(names) else None  # of some, unknown
    same = [cost for name in ("baseline", "distilled") if (cost := (stages[name]["latency_ms"] or {}).get("p50"))]
    ratios["latency_noise"] = max(same) / min(same) if len(same) > 1 else None  # both are the same network
    return {"teachers": len(names), "teachers_top1": top1, **_gap(lead, gain), **ratios}


def count_flips(correct: Mapping[str, Array]) -> dict[str, Any]:
    """Return ``flips`` of results.json: what students have wrong that the previous model has right, and the reverse.

    Rates are over all images, with 95 % intervals (Wilson); that of the difference of two students is paired.
    """
    before = correct["previous"]
    students: dict[str, Any] = {}
    for name in sort_stages(correct):
        if stage_role(name) in ("baseline", "distilled"):
            negative, positive = (int(each.sum()) for each in (before & ~correct[name], ~before & correct[name]))
            rate, low, high = wilson_interval(negative, len(before))
            students[name] = {
                "negative": negative, "positive": positive, "rate": rate, "rate_low": low, "rate_high": high,
            }  # fmt: skip
    found = {"images": len(before), "previous_correct": int(before.sum()), "students": students}
    if {"baseline", "distilled"} <= students.keys():
        difference = paired_interval(before & ~correct["baseline"], before & ~correct["distilled"])
        found |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
    return found
