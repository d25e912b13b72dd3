"""Every stage beside each other."""

from collections.abc import Callable
from typing import Any

from potstill.amounts import NONE, count, decimal, duration, milliseconds, number, percent, points, scaled
from potstill.experiments.stage_names import numbered
from potstill.report.contents import SPLITS, Run, Stage
from potstill.report.metric_names import Format, metric_rows
from potstill.report.texts import latency_text, teaching_text, training_text

Change = Callable[[float], str]  # how a difference is printed

_BETWEEN = ("assistant", "generation")
_PAIR = ("baseline", "distilled")


def context(run: Run) -> dict[str, Any] | None:
    """The short table on test, what each network costs, each seed, and all figures on all splits."""
    if not run.stages:
        return None
    stages = list(run.stages.values())
    return {
        "stages": [(stage.name, stage.model.get("architecture") or NONE) for stage in stages],
        "difference": {"baseline", "distilled"} <= set(run.stages),
        "several": len(_seeds(run).get("seeds") or [0]),
        "results": _results(run),
        "costs": _costs(stages),
        "seeds": _by_seed(run),
        "splits": [split for split in SPLITS if any(split in stage.metrics for stage in stages)],
        "all_rows": _all_rows(run, stages),
        "notes": [(stage.name, training_text(stage), latency_text(stage), teaching_text(stage)) for stage in stages],
        "others": _others(run),
    }


def _seeds(run: Run) -> dict[str, Any]:
    """What several seeds gave; empty where there is but one."""
    return (run.comparison or {}).get("seeds") or {}


def _by_seed(run: Run) -> list[list[str]]:
    """A row for each seed: top-1 of baseline and distilled, the gain, and which images changed."""
    rows = []
    for at, each in enumerate(_seeds(run).get("each") or [], start=1):
        stages = [(run.stages | run.repeats).get(numbered(role, at)) for role in ("baseline", "distilled")]
        tests = [{} if stage is None else stage.metrics.get("test", {}) for stage in stages]
        cells = [percent(test.get("top1")) for test in tests]
        changed = f"{count(each.get('fixed'))} / {count(each.get('broken'))}"
        rows.append([count(each.get("seed")), *cells, _interval(each), changed, decimal(each.get("mcnemar_p"), 3)])
    return rows


def _others(run: Run) -> list[dict[str, Any]]:
    """A row for each stage between teacher and student, and for several networks as one."""
    gains = (run.comparison or {}).get("others") or {}
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items() if stage.role in _BETWEEN}
    titles = dict.fromkeys(tests, "")
    for name, group in run.together.items():
        tests[name] = group.get("test") or {}
        titles[name] = ", ".join(map(str, group.get("of") or []))
    return [
        {
            "name": f"{name} together" if name in run.together else name,
            "of": titles[name],
            "cells": [percent(test.get("top1")), percent(test.get("f1_macro")), decimal(test.get("auc_macro"))],
            "gain": _interval(gains.get(name)),
        }
        for name, test in tests.items()
    ]


def _interval(gain: Any) -> str:
    ends = [number(gain.get(f"top1_gain{end}")) if isinstance(gain, dict) else None for end in ("", "_low", "_high")]
    value, low, high = ends
    if value is None:
        return NONE
    return points(value) if low is None or high is None else f"{points(value)} ({points(low)} to {points(high)})"


def _results(run: Run) -> list[dict[str, Any]]:
    """Rows on test with the difference distilled - baseline."""
    rows = [
        ("top1", "Top-1", percent, _points),
        ("top3", f"Top-{run.best_k}", percent, _points),
        ("f1_macro", "F1, macro", percent, _points),
        ("auc_macro", "AUC, macro", decimal, _decimals),
        ("ece", "ECE (lower is better)", percent, _points),
        ("nll", "NLL (lower is better)", decimal, _decimals),
        ("agreement", "Agreement with teacher", percent, _points),
    ]
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items()}
    return [
        {
            "name": name,
            "cells": [_cell(run, stage, key, form, change) for stage in run.stages.values()],
            "difference": _difference(run, key, change),
        }
        for key, name, form, change in rows
        if any(number(test.get(key)) is not None for test in tests.values())
    ]


def _cell(run: Run, stage: Stage, key: str, form: Format, change: Change) -> tuple[str, str]:
    """A figure on test and how sure it is: by its images; baseline and distilled of several seeds by these."""
    summary = (_seeds(run).get("figures") or {}).get(key) or {}
    which = {"baseline": "a", "distilled": "b"}.get(stage.name)
    mean, deviation = (number(summary.get(f"{part}_{which}")) for part in ("mean", "sd"))
    if mean is not None and deviation is not None:
        return form(mean), f"± {change(deviation).removeprefix('+')}"
    return _with_interval(stage, "test", key, form)


def _difference(run: Run, key: str, change: Change) -> tuple[str, str]:
    """Distilled - baseline, and its interval: over seeds where there are several, else over images if known."""
    summary = (_seeds(run).get("figures") or {}).get(key) or {}
    if number(summary.get("difference")) is not None:
        value = change(summary["difference"])
        low, high = (number(summary.get(f"difference_{end}")) for end in ("low", "high"))
        if key == "top1":  # the interval of the verdict, over seeds and images; the others are over seeds alone
            low, high = (number((_seeds(run).get("top1_gain") or {}).get(end)) for end in ("low", "high"))
    else:
        tests = [run.stages[name].metrics.get("test", {}) if name in run.stages else {} for name in _PAIR]
        before, after = (number(test.get(key)) for test in tests)
        if before is None or after is None:
            return NONE, ""
        value = change(after - before)
        low, high = (number((run.comparison or {}).get(f"{key}_gain_{end}")) for end in ("low", "high"))
    return value, "" if low is None or high is None else f"{change(low)} to {change(high)}"


def _points(difference: float) -> str:
    return points(difference)


def _decimals(difference: float) -> str:
    return f"{difference:+.4f}" if round(difference, 4) else "0.0000"


def _costs(stages: list[Stage]) -> list[tuple[str, list[str]]]:
    several: dict[str, Any] = next((stage.latency_of_batch for stage in stages if stage.latency_of_batch), {})
    batch = count(several.get("batch"))
    rows: list[tuple[str, list[str]]] = [
        ("Parameters", [scaled(stage.model.get("parameters")) for stage in stages]),
        ("FLOPs, one image", [scaled(stage.model.get("flops")) for stage in stages]),
        ("File size", [scaled(stage.model.get("file_bytes"), "B") for stage in stages]),
        ("Latency of one image, p50", [milliseconds(stage.latency.get("p50")) for stage in stages]),
        ("Latency of one image, p95", [milliseconds(stage.latency.get("p95")) for stage in stages]),
        (f"Latency of {batch} images, p50", [milliseconds(stage.latency_of_batch.get("p50")) for stage in stages]),
        (f"Latency of {batch} images, p95", [milliseconds(stage.latency_of_batch.get("p95")) for stage in stages]),
        (f"Images a second, {batch} at once", [_speed(stage.latency_of_batch) for stage in stages]),
        ("Memory: weights", [scaled(stage.memory.get("weights"), "B") for stage in stages]),
        ("Memory: one image on its way", [scaled(stage.memory.get("activations"), "B") for stage in stages]),
        ("Training time", [duration(stage.training.get("seconds")) for stage in stages]),
        ("Epochs (best)", [_epochs(stage) for stage in stages]),
        ("Teachers' answers, each step", [milliseconds(stage.teaching.get("ms_per_step")) for stage in stages]),
    ]
    return [(name, cells) for name, cells in rows if any(cell != NONE for cell in cells)]


def _speed(latency: dict[str, Any]) -> str:
    images, p50 = number(latency.get("batch")), number(latency.get("p50"))
    return NONE if images is None or not p50 else count(1000 * images / p50)


def _epochs(stage: Stage) -> str:
    if not stage.training:
        return NONE
    best = "" if stage.best_epoch is None else f" ({stage.best_epoch})"
    return count(stage.training.get("epochs")) + best


def _all_rows(run: Run, stages: list[Stage]) -> list[tuple[str, list[list[tuple[str, str]]]]]:
    """(metric, for each stage its cells over the splits)."""
    splits = [split for split in SPLITS if any(split in stage.metrics for stage in stages)]
    rows = []
    for key, name, form in metric_rows(run.best_k):
        cells = [[_with_interval(stage, split, key, form) for split in splits] for stage in stages]
        if any(cell[0] != NONE for stage_cells in cells for cell in stage_cells):
            rows.append((name, cells))
    return rows


def _with_interval(stage: Stage, split: str, key: str, form: Format) -> tuple[str, str]:
    low, high = stage.interval(key) if split == "test" else (None, None)
    value = form(stage.metrics.get(split, {}).get(key))
    sure = "" if low is None or high is None or value == NONE else f"{form(low).removesuffix(' %')} to {form(high)}"
    return value, sure
