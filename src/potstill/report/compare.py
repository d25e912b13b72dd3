"""Several runs on one page; runs that differ in nothing but their seed are judged together."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.amounts import NONE, count, decimal, number, percent, scaled
from potstill.artifacts import write_text
from potstill.errors import UsageError
from potstill.experiments.verdict import over_seeds, points, verdict_over_seeds
from potstill.report.contents import STAGES, Run, read_run
from potstill.report.metric_names import Format
from potstill.report.page import fill
from potstill.sealed import read_sealed_json

# key, name, how to print a value, and whether differences are percentage points
_METRICS: tuple[tuple[str, str, Format, bool], ...] = (
    ("top1", "Top-1", percent, True),
    ("top3", "Top-3", percent, True),
    ("f1_macro", "F1, macro", percent, True),
    ("auc_macro", "AUC, macro", decimal, False),
    ("ece", "ECE (lower is better)", percent, True),
)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe on the same data, one for each seed."""

    runs: list[Run]
    repeated: list[str]  # runs left out because a newer one has their seed


def compare(runs: Sequence[Path | str], output: Path | str) -> Path:
    """Write a page on several run folders to ``output`` and return its path.

    Raises:
        UsageError: no run was given.
        ArtifactError: one of them is no run folder, or is damaged.
        StorageError: ``output`` cannot be written.
    """
    if not runs:
        raise UsageError("compare needs run folders, and none was given: name them, e.g. runs/a runs/b")
    found = [read_run(Path(run)) for run in runs]
    groups = group(found)
    title = f"{count(len(found))} run{'s' if len(found) > 1 else ''} compared"
    summaries = [_summary(each) for each in groups if len(each.runs) > 1 or _pairs(each.runs, "top1")]
    values = {"title": title, "subtitle": "", "runs": [_row(run) for run in found], "stages": STAGES}
    target = Path(output)
    write_text(target, fill("compare.html.j2", values | {"groups": summaries}))
    return target


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs that share recipe, data, method and networks, in the order of their first run; newest of each seed."""
    teachers = [_teacher_digest(run) for run in runs]
    together: dict[str, list[Run]] = {}
    for run, teacher in zip(runs, teachers, strict=True):
        shared = teacher is not None and teachers.count(teacher) > 1
        together.setdefault(_likeness(run, teacher if shared else None), []).append(run)
    return [_distinct(alike) for alike in together.values()]


def _distinct(runs: list[Run]) -> Group:
    newest: dict[Any, Run] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: str(run.results.get("created"))):
        older = newest.get(run.results.get("seed"))
        if older is not None:
            repeated.append(older.name)
        newest[run.results.get("seed")] = run
    return Group(sorted(newest.values(), key=lambda run: number(run.results.get("seed")) or 0), repeated)


def _teacher_digest(run: Run) -> str | None:
    """SHA-256 of the teacher's weights; of each, where there are several."""
    paths = [run.folder / name / "model.json" for name, stage in run.stages.items() if stage.role == "teacher"]
    digests: list[Any] = [read_sealed_json(path).get("sha256") for path in paths if path.exists()]
    known = bool(digests) and len(digests) == len(paths) and all(isinstance(digest, str) for digest in digests)
    return " ".join(digests) if known else None


def _likeness(run: Run, teacher: str | None) -> str:
    """All that must be equal for two runs to differ in their seed alone, as text.

    ``teacher``: digest of a teacher that several runs share; then it does not matter which of them trained it.
    """
    import yaml

    try:
        recipe = yaml.safe_load(run.recipe or "")
    except yaml.YAMLError:
        recipe = run.recipe
    if isinstance(recipe, dict):
        unlike = {"seed", "name", "description"} | ({"teacher"} if teacher is not None else set())
        recipe = {key: value for key, value in recipe.items() if key not in unlike}
    networks = {name: stage.model.get("architecture") for name, stage in run.stages.items()}
    data = [run.data.get(key) for key in ("fingerprint", "class_names", "counts", "size")]
    parts = [run.results.get("recipe"), data, run.results.get("method"), networks, teacher, recipe]
    return json.dumps(parts, sort_keys=True, default=str)


def _row(run: Run) -> dict[str, Any]:
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items()}
    comparison = run.comparison or {}
    gain, low, high = (number(comparison.get(f"top1_gain{end}")) for end in ("", "_low", "_high"))
    interval = f" ({points(low)} to {points(high)})" if low is not None and high is not None else ""
    student = run.stages.get("distilled") or run.stages.get("baseline")
    seed = number(run.results.get("seed"))
    return {
        "name": run.name,
        "recipe": str(run.results.get("recipe") or NONE),
        "seed": NONE if seed is None else f"{seed:.0f}",
        "method": run.method or NONE,
        "cells": [percent(_test(run, name, "top1")) for name in STAGES],
        "f1": percent(tests.get("distilled", {}).get("f1_macro")),
        "gain": NONE if gain is None else points(gain) + interval,
        "parameters": scaled(student.model.get("parameters")) if student else NONE,
    }


def _summary(found: Group) -> dict[str, Any]:
    first = found.runs[0]
    differences = [b - a for a, b in _pairs(found.runs, "top1")]
    networks = [str(stage.model.get("architecture") or NONE) for stage in first.stages.values()]
    return {
        "recipe": str(first.results.get("recipe") or NONE),
        "networks": ", ".join(dict.fromkeys(networks)),
        "data": str(first.data.get("source") or NONE),
        "fingerprint": str(first.data.get("fingerprint") or NONE)[:12],
        "method": first.method or NONE,
        "seeds": ", ".join(str(run.results.get("seed")) for run in found.runs),
        "repeated": found.repeated,
        "verdict": verdict_over_seeds(differences) if differences else None,
        "rows": [row for metric in _METRICS if (row := _metric_row(found.runs, *metric))],
    }


def _metric_row(runs: list[Run], key: str, name: str, form: Format, in_points: bool) -> dict[str, Any] | None:
    """Mean and standard deviation of each stage, and of the differences within each seed."""
    columns = [[value for run in runs if (value := _test(run, stage, key)) is not None] for stage in STAGES]
    if not any(columns):
        return None
    spread = points if in_points else _plain_number
    cells = []
    for values in columns:
        text = form(statistics.fmean(values)) if values else NONE
        cells.append(f"{text} ± {spread(statistics.stdev(values), signed=False)}" if len(values) > 1 else text)
    differences = [b - a for a, b in _pairs(runs, key)]
    paired, interval = NONE, NONE
    if differences:
        mean, deviation, low, high = over_seeds(differences)
        paired = spread(mean) if deviation is None else f"{spread(mean)} ± {spread(deviation, signed=False)}"
        interval = NONE if low is None or high is None else f"{spread(low)} to {spread(high)}"
    return {"name": name, "cells": cells, "paired": paired, "interval": interval, "count": len(differences)}


def _pairs(runs: list[Run], key: str) -> list[tuple[float, float]]:
    both = [(_test(run, "baseline", key), _test(run, "distilled", key)) for run in runs]
    return [(a, b) for a, b in both if a is not None and b is not None]


def _test(run: Run, stage: str, key: str) -> float | None:
    """A figure on test; "teacher" is what several teachers say together."""
    if stage == "teacher" and "teachers" in run.together:
        return number((run.together["teachers"].get("test") or {}).get(key))
    return number(run.stages[stage].metrics.get("test", {}).get(key)) if stage in run.stages else None


def _plain_number(value: float, *, signed: bool = True) -> str:
    return f"{value:{'+' if signed else ''}.4f}" if round(value, 4) else "0.0000"
