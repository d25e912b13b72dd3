"""Several runs on one page; runs that differ in nothing but their seed are judged together.

A run of several seeds counts with each of them.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.config.settings_errors import format_value
from potstill.config.stage_names import repeat_index
from potstill.errors import UsageError
from potstill.evaluation.classification import Array
from potstill.evaluation.significance import crossed_interval, mcnemar, paired_interval, seeds_summary
from potstill.experiment.resume import describe_view_difference, flatten_settings, is_result_neutral
from potstill.experiment.run_folder import RunFolder
from potstill.experiment.verdict import average_over_seeds, headline
from potstill.formatting import (
    MISSING,
    format_count,
    format_decimal,
    format_number,
    format_percent,
    format_points,
    format_scaled,
)
from potstill.io import read_checksummed_json, write_text
from potstill.report.pairing import Contender, pair_contenders, pairing_row, read_contender
from potstill.report.render import render_template
from potstill.report.run_reader import STAGES, Run, StageResult, read_run
from potstill.report.text_reports import ValueFormatter

# key, name, how to print a value, and whether differences are percentage points
_METRICS: tuple[tuple[str, str, ValueFormatter, bool], ...] = (
    ("top1", "Top-1", format_percent, True),
    ("top3", "Top-3", format_percent, True),
    ("f1_macro", "F1, macro", format_percent, True),
    ("auc_macro", "AUC, macro", format_decimal, False),
    ("ece", "ECE (lower is better)", format_percent, True),
)


_ABSENT = object()  # a setting that a recipe does not have


@dataclass(frozen=True)
class RunGroup:
    """Runs of one recipe on the same data, one for each seed."""

    runs: list[Run]
    repeated: list[str]  # runs left out because a newer one has their seed

    def of(self, role: str) -> dict[int, tuple[Run, StageResult]]:
        """The stage of a role by seed, further seeds of a run among them; of one seed, the run's that began with it."""
        found: dict[int, tuple[Run, StageResult]] = {}
        for run in self.runs:
            first = int(format_number(run.results.get("seed")) or 0)
            for name, stage in (run.stages | run.repeats).items():
                if stage.role == role:
                    seed = first + repeat_index(name)
                    if seed not in found or name == role:
                        found[seed] = (run, stage)
        return dict(sorted(found.items()))


def compare(runs: Sequence[Path | str], output: Path | str) -> Path:
    """Write a page on several run folders to ``output`` and return its path.

    Raises:
        UsageError: no run was given.
        ArtifactError: one of them is no run folder, or is damaged.
        StorageError: ``output`` cannot be written, or one of the runs is being written.
    """
    if not runs:
        raise UsageError("compare needs run folders, and none was given: name them, e.g. runs/a runs/b")
    with ExitStack() as stack:  # predictions are read late
        for folder in {Path(run).resolve(): RunFolder(Path(run)) for run in runs}.values():
            stack.enter_context(folder.held(writing=False))
        return _write_page([read_run(Path(run)) for run in runs], Path(output))


def _write_page(found: list[Run], target: Path) -> Path:
    groups = group_runs(found)
    title = f"{format_count(len(found))} run{'s' if len(found) > 1 else ''} compared"
    summaries = [_group_summary(each) for each in groups if len(each.runs) > 1 or _paired_values(each, "top1")]
    entrants = [read_contender(_group_name(each), each.of("distilled") or each.of("baseline")) for each in groups]
    meetings, notes = pair_contenders(entrants)
    notes += _view_notes(entrants)
    values: dict[str, Any] = {
        "title": title,
        "subtitle": "",
        "stages": STAGES,
        "runs": [_run_row(run) for run in found],
    }
    values |= {"groups": summaries, "meetings": [pairing_row(each) for each in meetings], "notes": notes}
    values |= {"seeds": _seed_table(entrants), "differing": _different_settings(groups)}
    write_text(target, render_template("compare.html.j2", values))
    return target


def _group_name(found: RunGroup) -> str:
    """``quickstart (kd)``: its first run, and its method; of one that was not distilled, "baseline" or "teacher"."""
    first = found.runs[0]
    what = _method_or_stage(first)
    return f"{first.name} ({what})" if what else first.name


def _method_or_stage(run: Run) -> str:
    """What stands for a run: its method where there is a distilled student, else the stage that there is."""
    return run.method if "distilled" in run.stages else next((name for name in STAGES[::-1] if name in run.stages), "")


def _different_settings(groups: Sequence[RunGroup]) -> dict[str, Any] | None:
    """A row for each setting of the recipes in which the groups differ; None where there is but one group."""
    if len(groups) < 2:
        return None
    recipes = [flatten_settings(_read_recipe(each.runs[0])) for each in groups]
    keys = [
        key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if key and not is_result_neutral(key)
    ]
    rows = []
    for key in keys:
        values = [recipe.get(key, _ABSENT) for recipe in recipes]
        if any(value != values[0] for value in values):
            rows.append((key, ["" if value is _ABSENT else format_value(value) for value in values]))
    return {"names": [_group_name(each) for each in groups], "rows": rows}


def _read_recipe(run: Run) -> Any:
    """recipe.yaml as plain values; the text itself where it is no YAML."""
    import yaml

    try:
        return yaml.safe_load(run.recipe or "")
    except yaml.YAMLError:
        return run.recipe


def _view_notes(entrants: Sequence[Contender]) -> list[str]:
    """A sentence on each entrant whose students saw other views than those of the first, in the seeds they share."""
    if not entrants:
        return []
    first, notes = entrants[0], []
    for other in entrants[1:]:
        for seed in sorted(first.students.keys() & other.students.keys()):
            views, others = (each.students[seed][1].facts.get("views") for each in (first, other))
            if sentence := describe_view_difference(first.name, views, other.name, others):
                notes.append(sentence)
                break
    return notes


def _seed_table(entrants: Sequence[Contender]) -> dict[str, Any] | None:
    """Methods x seeds: top-1 on test of each student; None where there is but one of either."""
    seeds = sorted({seed for entrant in entrants for seed in entrant.students})
    if len(seeds) < 2:
        return None
    rows = []
    for entrant in entrants:
        tops = {
            seed: format_number(stage.metrics.get("test", {}).get("top1"))
            for seed, (_, stage) in entrant.students.items()
        }
        known = [top1 for top1 in tops.values() if top1 is not None]
        spread = f" ± {format_points(statistics.stdev(known), signed=False)}" if len(known) > 1 else ""
        mean = format_percent(statistics.fmean(known)) + spread if known else MISSING
        rows.append((entrant.name, [format_percent(tops.get(seed)) for seed in seeds], mean))
    return {"seeds": [str(seed) for seed in seeds], "rows": rows}


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Runs that share recipe, data, method and networks, in the order of their first run; newest of each seed."""
    teachers = [_teacher_digest(run) for run in runs]
    together: dict[str, list[Run]] = {}
    for run, teacher in zip(runs, teachers, strict=True):
        shared = teacher is not None and teachers.count(teacher) > 1
        together.setdefault(_group_key(run, teacher if shared else None), []).append(run)
    return [_newest_per_seed(alike) for alike in together.values()]


def _newest_per_seed(runs: list[Run]) -> RunGroup:
    newest: dict[Any, Run] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: str(run.results.get("created"))):
        older = newest.get(run.results.get("seed"))
        if older is not None:
            repeated.append(older.name)
        newest[run.results.get("seed")] = run
    return RunGroup(sorted(newest.values(), key=lambda run: format_number(run.results.get("seed")) or 0), repeated)


def _teacher_digest(run: Run) -> str | None:
    """SHA-256 of the teacher's weights; of each, where there are several."""
    paths = [run.folder / name / "model.json" for name, stage in run.stages.items() if stage.role == "teacher"]
    digests: list[Any] = [read_checksummed_json(path).get("sha256") for path in paths if path.exists()]
    known = bool(digests) and len(digests) == len(paths) and all(isinstance(digest, str) for digest in digests)
    return " ".join(digests) if known else None


def _group_key(run: Run, teacher: str | None) -> str:
    """All that must be equal for two runs to differ in their seed alone, as text.

    ``teacher``: digest of a teacher that several runs share; then it does not matter which of them trained it.
    """
    recipe = _read_recipe(run)
    if isinstance(recipe, dict):
        unlike = {"seed", "seeds", "name", "description"} | ({"teacher"} if teacher is not None else set())
        recipe = {key: value for key, value in recipe.items() if key not in unlike}
    networks = {name: stage.model.get("architecture") for name, stage in run.stages.items()}
    data = [run.data.get(key) for key in ("fingerprint", "class_names", "counts", "size")]
    parts = [run.results.get("recipe"), data, run.results.get("method"), networks, teacher, recipe]
    return json.dumps(parts, sort_keys=True, default=str)


def _run_row(run: Run) -> dict[str, Any]:
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items()}
    comparison = average_over_seeds(run.comparison or {})
    gain, low, high = (format_number(comparison.get(f"top1_gain{end}")) for end in ("", "_low", "_high"))
    interval = f" ({format_points(low)} to {format_points(high)})" if low is not None and high is not None else ""
    student = run.stages.get("distilled") or run.stages.get("baseline")
    seed = format_number(run.results.get("seed"))
    return {
        "name": run.name,
        "recipe": str(run.results.get("recipe") or MISSING),
        "seed": _seed_range(seed, comparison),
        "method": _method_or_stage(run) or MISSING,
        "cells": [format_percent(_test_value(run, name, "top1")) for name in STAGES],
        "f1": format_percent(tests.get("distilled", {}).get("f1_macro")),
        "gain": MISSING if gain is None else format_points(gain) + interval,
        "parameters": format_scaled(student.model.get("parameters")) if student else MISSING,
    }


def _seed_range(first: float | None, comparison: dict[str, Any]) -> str:
    """``0``, or ``0 to 4``."""
    if first is None:
        return MISSING
    several = format_number(comparison.get("seeds_count"))
    return f"{first:.0f}" if several is None else f"{first:.0f} to {first + several - 1:.0f}"


def _group_summary(found: RunGroup) -> dict[str, Any]:
    first = found.runs[0]
    differences = [b - a for a, b in _paired_values(found, "top1")]
    networks = [str(stage.model.get("architecture") or MISSING) for stage in first.stages.values()]
    seeds = found.of("distilled") or found.of("baseline") or found.of("teacher")
    return {
        "recipe": str(first.results.get("recipe") or MISSING),
        "networks": ", ".join(dict.fromkeys(networks)),
        "data": str(first.data.get("source") or MISSING),
        "fingerprint": str(first.data.get("fingerprint") or MISSING)[:12],
        "method": _method_or_stage(first) or MISSING,
        "seeds": ", ".join(str(seed) for seed in seeds),
        "repeated": found.repeated,
        "verdict": _group_verdict(found, differences) if differences else None,
        "rows": [row for metric in _METRICS if (row := _metric_row(found, *metric))],
    }


def _group_verdict(found: RunGroup, differences: Sequence[float]) -> str:
    """As a run of these seeds gives it; none where the test predictions of a seed are missing."""
    before, after = (read_contender("", found.of(role)).correct for role in ("baseline", "distilled"))
    if not before or before.keys() != after.keys() or len(before) != len(differences):
        return (
            "No verdict: it takes the test predictions of baseline and distilled student of every seed, and some are "
            "missing or are of other images."
        )
    return headline(compare_predictions(before, after))


def compare_predictions(before: Mapping[int, Array], after: Mapping[int, Array]) -> dict[str, Any]:
    """What the headline takes of ``comparison``, from the images that each student has right: seed -> [N] bool."""
    shared = sorted(before.keys() & after.keys())
    a, b = (np.stack([correct[seed] for seed in shared]) for correct in (before, after))
    if len(shared) == 1:
        gain, test = paired_interval(a[0], b[0]), mcnemar(a[0], b[0])
        ends = {"top1_gain": gain.value, "top1_gain_low": gain.low, "top1_gain_high": gain.high}
        return {"test_images": a.shape[1], **ends, "fixed": test["fixed"], "broken": test["broken"]}
    whole = crossed_interval(a, b)._asdict()
    return {"test_images": a.shape[1], "seeds": {"figures": {"top1": {"n": len(shared)}}, "top1_gain": whole}}


def _metric_row(found: RunGroup, key: str, name: str, form: ValueFormatter, in_points: bool) -> dict[str, Any] | None:
    """Mean and standard deviation of each stage, and of the differences within each seed."""
    columns = [[value for value in _test_values(found, stage, key).values() if value is not None] for stage in STAGES]
    if not any(columns):
        return None
    spread = format_points if in_points else _decimal_text
    cells = []
    for values in columns:
        text = form(statistics.fmean(values)) if values else MISSING
        cells.append(f"{text} ± {spread(statistics.stdev(values), signed=False)}" if len(values) > 1 else text)
    pairs = _paired_values(found, key)
    paired, interval = MISSING, MISSING
    if pairs:
        found_here = seeds_summary([a for a, _ in pairs], [b for _, b in pairs])
        mean, deviation, low, high = (found_here[f"difference{end}"] for end in ("", "_sd", "_low", "_high"))
        assert mean is not None
        paired = spread(mean) if deviation is None else f"{spread(mean)} ± {spread(deviation, signed=False)}"
        interval = MISSING if low is None or high is None else f"{spread(low)} to {spread(high)}"
    return {"name": name, "cells": cells, "paired": paired, "interval": interval, "count": len(pairs)}


def _paired_values(found: RunGroup, key: str) -> list[tuple[float, float]]:
    baseline, distilled = (_test_values(found, stage, key) for stage in ("baseline", "distilled"))
    both = [(baseline[seed], distilled[seed]) for seed in baseline if seed in distilled]
    return [(a, b) for a, b in both if a is not None and b is not None]


def _test_values(found: RunGroup, stage: str, key: str) -> dict[int, float | None]:
    """A figure on test by seed; "teacher" is that of each run, or what several teachers say together."""
    if stage == "teacher":
        return {at: _test_value(run, "teacher", key) for at, run in enumerate(found.runs)}
    return {seed: format_number(each.metrics.get("test", {}).get(key)) for seed, (_, each) in found.of(stage).items()}


def _test_value(run: Run, stage: str, key: str) -> float | None:
    """A figure of the first seed on test; "teacher" is what several teachers say together."""
    if stage == "teacher" and "teachers" in run.together:
        return format_number((run.together["teachers"].get("test") or {}).get(key))
    return format_number(run.stages[stage].metrics.get("test", {}).get(key)) if stage in run.stages else None


def _decimal_text(value: float, *, signed: bool = True) -> str:
    return f"{value:{'+' if signed else ''}.4f}" if round(value, 4) else "0.0000"
