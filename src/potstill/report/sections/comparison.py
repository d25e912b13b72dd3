"""Every stage beside each other."""

from collections.abc import Callable
from typing import Any

from potstill.amounts import NONE, count, decimal, duration, milliseconds, number, percent, scaled
from potstill.experiments.verdict import points
from potstill.report.contents import SPLITS, Run, Stage
from potstill.report.metric_names import metric_rows
from potstill.report.texts import latency_text, teaching_text, training_text

_BETWEEN = ("assistant", "generation")


def context(run: Run) -> dict[str, Any] | None:
    """The short table on test, and all figures on all splits."""
    if not run.stages:
        return None
    stages = list(run.stages.values())
    return {
        "stages": [(stage.name, stage.model.get("architecture") or NONE) for stage in stages],
        "difference": {"baseline", "distilled"} <= set(run.stages),
        "results": _results(run),
        "costs": _costs(stages),
        "splits": [split for split in SPLITS if any(split in stage.metrics for stage in stages)],
        "all_rows": _all_rows(run, stages),
        "notes": [(stage.name, training_text(stage), latency_text(stage), teaching_text(stage)) for stage in stages],
        "others": _others(run),
    }


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
        ("agreement", "Agreement with teacher", percent, _points),
    ]
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items()}
    return [
        {
            "name": name,
            "cells": [form(test.get(key)) for test in tests.values()],
            "difference": _difference(tests, key, change, run.comparison),
        }
        for key, name, form, change in rows
        if any(number(test.get(key)) is not None for test in tests.values())
    ]


def _difference(
    tests: dict[str, dict[str, Any]],
    key: str,
    change: Callable[[float], str],
    comparison: dict[str, Any] | None,
) -> str:
    before, after = (number(tests.get(name, {}).get(key)) for name in ("baseline", "distilled"))
    if before is None or after is None:
        return NONE
    text = change(after - before)
    low, high = (number((comparison or {}).get(f"{key}_gain_{end}")) for end in ("low", "high"))
    return text if low is None or high is None else f"{text} ({points(low)} to {points(high)})"


def _points(difference: float) -> str:
    return points(difference)


def _decimals(difference: float) -> str:
    return f"{difference:+.4f}" if round(difference, 4) else "0.0000"


def _costs(stages: list[Stage]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = [
        ("Parameters", [scaled(stage.model.get("parameters")) for stage in stages]),
        ("FLOPs, one image", [scaled(stage.model.get("flops")) for stage in stages]),
        ("File size", [scaled(stage.model.get("file_bytes"), "B") for stage in stages]),
        ("Latency p50", [milliseconds(stage.latency.get("p50")) for stage in stages]),
        ("Training time", [duration(stage.training.get("seconds")) for stage in stages]),
        ("Epochs (best)", [_epochs(stage) for stage in stages]),
        ("Teachers' answers, each step", [milliseconds(stage.teaching.get("ms_per_step")) for stage in stages]),
    ]
    return [(name, cells) for name, cells in rows if any(cell != NONE for cell in cells)]


def _epochs(stage: Stage) -> str:
    if not stage.training:
        return NONE
    best = "" if stage.best_epoch is None else f" ({stage.best_epoch})"
    return count(stage.training.get("epochs")) + best


def _all_rows(run: Run, stages: list[Stage]) -> list[tuple[str, list[list[str]]]]:
    """(metric, for each stage its cells over the splits)."""
    splits = [split for split in SPLITS if any(split in stage.metrics for stage in stages)]
    rows = []
    for key, name, form in metric_rows(run.best_k):
        cells = [[form(stage.metrics.get(split, {}).get(key)) for split in splits] for stage in stages]
        if any(cell != NONE for stage_cells in cells for cell in stage_cells):
            rows.append((name, cells))
    return rows
