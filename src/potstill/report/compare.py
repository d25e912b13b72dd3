"""The page that compares several runs, and paired comparisons on the same test images, image by image, seed by seed.

Runs that differ only in their seed form a group.
"""

import csv
import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.config import STAGES, repeat_index
from potstill.config.settings_errors import format_value
from potstill.config.yaml import parse_yaml
from potstill.errors import ArtifactError, UsageError
from potstill.evaluation import Array
from potstill.evaluation.significance import Interval, crossed_interval, mcnemar, paired_interval, seeds_summary
from potstill.experiment.resume import describe_view_difference, flatten_settings, is_result_neutral
from potstill.experiment.run_folder import RunFolder
from potstill.experiment.verdict import MIN_FOLDS, MIN_SEEDS, average_over_seeds, headline, seeds_count
from potstill.formatting import (
    MISSING,
    format_count,
    format_decimal,
    format_difference,
    format_interval,
    format_number,
    format_percent,
    format_points,
    format_scaled,
)
from potstill.io import read_bytes, read_checksummed_json, unescape_cell, write_text
from potstill.report.advice import final_metric
from potstill.report.render import render_template
from potstill.report.run_reader import Run, StageResult, read_predictions, read_run
from potstill.report.text_reports import ValueFormatter, gain_with_interval

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

    def stages_by_seed(self, role: str) -> dict[int, tuple[Run, StageResult]]:
        """Return the stage of a role by seed, including a run's further seeds; a run's first seed has precedence."""
        found: dict[int, tuple[Run, StageResult]] = {}
        for run in self.runs:
            first = int(format_number(run.results.get("seed")) or 0)
            for name, stage in (run.stages | run.repeats).items():
                if stage.role == role:
                    seed = first + repeat_index(name)
                    if seed not in found or name == role:
                        found[seed] = (run, stage)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Contender:
    """One recipe with its distilled students, by seed; the baselines where there is no distilled student."""

    name: str
    students: Mapping[int, tuple[Run, StageResult]]
    images: tuple[tuple[str, str], ...] = ()  # (name, class) of each test image, as the predictions list them
    correct: Mapping[int, Array] = field(default_factory=dict)  # seed -> [N] bool
    fingerprint: str = ""
    folds: Array | None = None  # [N] fold that tests each image, from 0; None: no cross-validation


@dataclass(frozen=True)
class Pairing:
    """The difference of two contenders, second minus first."""

    first: str
    second: str
    seeds: int
    gain: Interval  # mean gain of top-1; interval over seeds and test images, with one seed over test images
    p: float
    adjusted: float = 1.0  # p adjusted for the number of pairs
    folds: int = 0  # of a cross-validation


def compare(runs: Sequence[Path | str], output: Path | str) -> Path:
    """Write the page that compares run folders to ``output`` and return its path."""
    if not runs:
        raise UsageError("compare needs run folders, and none was given: name them, e.g. runs/a runs/b")
    with ExitStack() as stack:  # predictions are read late
        for folder in {Path(run).resolve(): RunFolder(Path(run)) for run in runs}.values():
            stack.enter_context(folder.held(writing=False))
        return _write_page([read_run(Path(run)) for run in runs], Path(output))


def _write_page(found: list[Run], target: Path) -> Path:
    groups = group_runs(found)
    title = f"{format_count(len(found))} run{'s' if len(found) > 1 else ''} compared"
    summaries = [
        _group_summary(each) for each in groups if len(each.runs) > 1 or _paired_values(each, "top1")
    ]  # a run of several seeds counts too
    contenders = [
        read_contender(_group_name(each), each.stages_by_seed("distilled") or each.stages_by_seed("baseline"))
        for each in groups
    ]
    pairings, notes = pair_contenders(contenders)
    notes += _view_notes(contenders)
    if unlabeled := [run.name for run in found if run.without_labels.get("test_labeled") is False]:
        notes.append(f"{', '.join(unlabeled)}: no labels; top-1 is the agreement with the classes of the run's teacher")
    values: dict[str, Any] = {
        "title": title,
        "subtitle": "",
        "stages": STAGES,
        "runs": [_run_row(run) for run in found],
    }
    values |= {"groups": summaries, "pairings": [pairing_row(each) for each in pairings], "notes": notes}
    values |= {"seeds": _seed_table(contenders), "differing": _different_settings(groups)}
    write_text(target, render_template("compare.html.j2", values))
    return target


def _group_name(group: RunGroup) -> str:
    first = group.runs[0]
    label = _method_or_stage(first)
    return f"{first.name} ({label})" if label else first.name


def _method_or_stage(run: Run) -> str:
    """Return a run's method if it has a distilled student, else its last stage."""
    return run.method if "distilled" in run.stages else next((name for name in STAGES[::-1] if name in run.stages), "")


def _different_settings(groups: Sequence[RunGroup]) -> dict[str, Any] | None:
    if len(groups) < 2:
        return None
    recipes = [flatten_settings(_read_recipe(each.runs[0])) for each in groups]
    keys = [
        key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if key and not is_result_neutral(key)
    ]
    rows = []
    for key in keys:
        values = [recipe.get(key, _ABSENT) for recipe in recipes]
        if any(value != values[0] for value in values) and any(value not in (_ABSENT, None, []) for value in values):
            rows.append((key, ["" if value is _ABSENT else format_value(value) for value in values]))
    return {"names": [_group_name(each) for each in groups], "rows": rows}


def _read_recipe(run: Run) -> Any:
    """Return recipe.yaml as plain values, or its text if it is no YAML."""
    try:
        return parse_yaml(run.recipe or "", "recipe.yaml").value
    except UsageError:
        return run.recipe


def _view_notes(contenders: Sequence[Contender]) -> list[str]:
    """Return a sentence for each contender whose students saw other views than the first's, in shared seeds."""
    if not contenders:
        return []
    first, notes = contenders[0], []
    for other in contenders[1:]:
        for seed in sorted(first.students.keys() & other.students.keys()):
            views, others = (each.students[seed][1].facts.get("views") for each in (first, other))
            if sentence := describe_view_difference(first.name, views, other.name, others):
                notes.append(sentence)
                break
    return notes


def _seed_table(contenders: Sequence[Contender]) -> dict[str, Any] | None:
    seeds = sorted({seed for each in contenders for seed in each.students})
    if len(seeds) < 2:
        return None
    rows = []
    for each in contenders:
        top1 = {seed: _test_metric(stage, "top1") for seed, (_, stage) in each.students.items()}
        known = [value for value in top1.values() if value is not None]
        deviation = f" ± {format_points(statistics.stdev(known), signed=False)}" if len(known) > 1 else ""
        mean = format_percent(statistics.fmean(known)) + deviation if known else MISSING
        rows.append((each.name, [format_percent(top1.get(seed)) for seed in seeds], mean))
    return {"seeds": [str(seed) for seed in seeds], "rows": rows}


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs with equal recipe, data, method and networks, in order of the first run; newest of each seed."""
    teachers = [_teacher_digest(run) for run in runs]
    groups: dict[str, list[Run]] = {}
    for run, teacher in zip(runs, teachers, strict=True):
        shared = teacher is not None and teachers.count(teacher) > 1
        groups.setdefault(_group_key(run, teacher if shared else None), []).append(run)
    return [_newest_per_seed(group) for group in groups.values()]


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
    """Return the SHA-256 of the weights of all teachers; None if unknown."""
    paths = [run.folder / name / "model.json" for name, stage in run.stages.items() if stage.role == "teacher"]
    digests: list[Any] = [read_checksummed_json(path).get("sha256") for path in paths if path.exists()]
    known = bool(digests) and len(digests) == len(paths) and all(isinstance(digest, str) for digest in digests)
    return " ".join(digests) if known else None


def _group_key(run: Run, teacher: str | None) -> str:
    """Return as text what runs of a group have in common; ``teacher``: digest of one that they share."""
    recipe = _read_recipe(run)
    if isinstance(recipe, dict):
        ignored = {"seed", "seeds", "name", "description"} | ({"teacher"} if teacher is not None else set())
        recipe = {key: value for key, value in recipe.items() if key not in ignored}
    networks = {name: stage.model.get("architecture") for name, stage in run.stages.items()}
    data = [run.data.get(key) for key in ("fingerprint", "class_names", "counts", "size")]
    parts = [run.results.get("recipe"), data, run.results.get("method"), networks, teacher, recipe]
    return json.dumps(parts, sort_keys=True, default=str)


def _run_row(run: Run) -> dict[str, Any]:
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items()}
    comparison = average_over_seeds(run.comparison or {})
    student = run.stages.get("distilled") or run.stages.get("baseline")
    seed = format_number(run.results.get("seed"))
    return {
        "name": run.name,
        "recipe": str(run.results.get("recipe") or MISSING),
        "seed": _seed_range(seed, comparison),
        "method": _method_or_stage(run) or MISSING,
        "cells": [format_percent(final_metric(run, name, "test", "top1")) for name in STAGES],
        "f1": format_percent(tests.get("distilled", {}).get("f1_macro")),
        "gain": gain_with_interval(comparison),
        "parameters": format_scaled(student.model.get("parameters")) if student else MISSING,
    }


def _seed_range(first: float | None, comparison: dict[str, Any]) -> str:
    if first is None:
        return MISSING
    several = seeds_count(comparison)
    return f"{first:.0f}" if several == 1 else f"{first:.0f} to {first + several - 1:.0f}"


def _group_summary(group: RunGroup) -> dict[str, Any]:
    first = group.runs[0]
    differences = [b - a for a, b in _paired_values(group, "top1")]
    networks = [str(stage.model.get("architecture") or MISSING) for stage in first.stages.values()]
    seeds = next((found for role in ("distilled", "baseline", "teacher") if (found := group.stages_by_seed(role))), {})
    return {
        "recipe": str(first.results.get("recipe") or MISSING),
        "networks": ", ".join(dict.fromkeys(networks)),
        "data": str(first.data.get("source") or MISSING),
        "fingerprint": str(first.data.get("fingerprint") or MISSING)[:12],
        "method": _method_or_stage(first) or MISSING,
        "seeds": ", ".join(str(seed) for seed in seeds),
        "repeated": group.repeated,
        "verdict": _group_verdict(group, differences) if differences else None,
        "rows": [row for metric in _METRICS if (row := _metric_row(group, *metric))],
    }


def _group_verdict(group: RunGroup, differences: Sequence[float]) -> str:
    """Return the verdict of a run with these seeds; it needs the test predictions of every seed."""
    baseline, distilled = (read_contender("", group.stages_by_seed(role)) for role in ("baseline", "distilled"))
    before, after = baseline.correct, distilled.correct
    if not before or before.keys() != after.keys() or len(before) != len(differences):
        return (
            "No verdict: test predictions of baseline or distilled student are missing for a seed, or are of other "
            "images."
        )
    own = group.runs[0].comparison
    if len(group.runs) == 1 and seeds_count(own) == len(before):  # it knows how often test was evaluated
        return headline(own)
    if not _have_same_folds(baseline, distilled):
        return "No verdict: the cross-validations have different folds."
    return headline(compare_predictions(before, after, baseline.folds))


def compare_predictions(
    before: Mapping[int, Array], after: Mapping[int, Array], folds: Array | None = None
) -> dict[str, Any]:
    """Return the part of ``comparison`` for the headline, from the correct images of each student: seed -> [N] bool.

    ``folds``: [N] fold of each image, of a cross-validation.
    """
    shared = sorted(before.keys() & after.keys())
    a, b = (np.stack([correct[seed] for seed in shared]) for correct in (before, after))
    if folds is not None:
        count = int(folds.max()) + 1
        facts = {"folds": count, "seeds": len(shared), "figures": {"top1": {"n": count}}}
        crossed = crossed_interval(a, b, folds=folds)._asdict()
        return {"test_images": a.shape[1], "folds": facts | {"top1_gain": crossed}}
    if len(shared) == 1:
        gain, test = paired_interval(a[0], b[0]), mcnemar(a[0], b[0])
        ends = {"top1_gain": gain.value, "top1_gain_low": gain.low, "top1_gain_high": gain.high}
        return {"test_images": a.shape[1], **ends, "fixed": test["fixed"], "broken": test["broken"]}
    crossed = crossed_interval(a, b)._asdict()
    return {"test_images": a.shape[1], "seeds": {"figures": {"top1": {"n": len(shared)}}, "top1_gain": crossed}}


def _metric_row(group: RunGroup, key: str, name: str, form: ValueFormatter, in_points: bool) -> dict[str, Any] | None:
    """Return mean and standard deviation of each stage, and of the differences within each seed."""
    columns = [[value for value in _test_values(group, stage, key).values() if value is not None] for stage in STAGES]
    if not any(columns):
        return None
    change = format_points if in_points else format_difference
    cells = []
    for values in columns:
        text = form(statistics.fmean(values)) if values else MISSING
        cells.append(f"{text} ± {change(statistics.stdev(values), signed=False)}" if len(values) > 1 else text)
    pairs = _paired_values(group, key)
    paired, interval = MISSING, MISSING
    if pairs:
        summary = seeds_summary([a for a, _ in pairs], [b for _, b in pairs])
        mean, deviation, low, high = (summary[f"difference{end}"] for end in ("", "_sd", "_low", "_high"))
        assert mean is not None
        paired = change(mean) if deviation is None else f"{change(mean)} ± {change(deviation, signed=False)}"
        interval = format_interval(low, high, change, MISSING)
    return {"name": name, "cells": cells, "paired": paired, "interval": interval, "count": len(pairs)}


def _paired_values(group: RunGroup, key: str) -> list[tuple[float, float]]:
    baseline, distilled = (_test_values(group, stage, key) for stage in ("baseline", "distilled"))
    both = [(baseline[seed], distilled[seed]) for seed in baseline if seed in distilled]
    return [(a, b) for a, b in both if a is not None and b is not None]


def _test_values(group: RunGroup, stage: str, key: str) -> dict[int, float | None]:
    """Return a metric on test by seed; for "teacher", by run."""
    if stage == "teacher":
        return {i: final_metric(run, "teacher", "test", key) for i, run in enumerate(group.runs)}
    return {seed: _test_metric(each, key) for seed, (_, each) in group.stages_by_seed(stage).items()}


def _test_metric(stage: StageResult, key: str) -> float | None:
    return format_number(stage.metrics.get("test", {}).get(key))


MAX_ALL_PAIRS = 6  # contenders up to which all pairs are compared; of more, each with the first


def read_contender(name: str, students: Mapping[int, tuple[Run, StageResult]]) -> Contender:
    """Read the test predictions of a contender's students; seeds with other images than the first are left out."""
    images: tuple[tuple[str, str], ...] = ()
    correct: dict[int, Array] = {}
    for seed, (_, stage) in students.items():
        found = read_predictions(stage, "test")
        if found is None:
            continue
        labels = [found.class_names[label] for label in found.labels]
        seed_images = tuple(zip(found.paths, labels, strict=True))
        images = images or seed_images
        if seed_images == images:
            correct[seed] = np.asarray(found.predicted) == np.asarray(found.labels)
    first = next((run for run, _ in students.values()), None)
    if first is None:
        return Contender(name, students)
    fingerprint, folds = str(first.data.get("fingerprint") or ""), None
    if first.folds and images:
        folds = _read_folds(first, [path for path, _ in images])
    return Contender(name, students, images, correct, fingerprint, folds)


def _read_folds(run: Run, names: Sequence[str]) -> Array:
    """Return the fold of a cross-validation that tests each image, from 0."""
    fold_of: dict[str, int] = {}
    for at, each in enumerate(run.folds):
        path = run.folder / str(each.get("folder")) / "splits.csv"
        rows = csv.reader(io.StringIO(read_bytes(path).decode("utf-8", "replace")))
        fold_of |= {unescape_cell(row[1]): at for row in rows if len(row) > 1 and row[0] == "test"}
    if lost := [name for name in names if name not in fold_of]:
        raise ArtifactError(f"{run.folder}: no fold has {lost[0]} in test; the folders of its folds are of another run")
    return np.array([fold_of[name] for name in names])


def _have_same_folds(first: Contender, second: Contender) -> bool:
    if first.folds is None or second.folds is None:
        return first.folds is second.folds
    return np.array_equal(first.folds, second.folds)


def pair_contenders(contenders: Sequence[Contender]) -> tuple[list[Pairing], list[str]]:
    """Compare all pairs on the same test images; return also a sentence for each pair that cannot be compared."""
    pairs = list(itertools.combinations(contenders, 2))
    if len(contenders) > MAX_ALL_PAIRS:
        pairs = [(contenders[0], other) for other in contenders[1:]]
    pairings, notes = [], []
    for first, second in pairs:
        reason = _incomparable_reason(first, second)
        if reason:
            notes.append(reason)
            continue
        pairings.append(_make_pairing(first, second))
        if first.fingerprint != second.fingerprint:
            notes.append(
                f"{first.name} and {second.name} have test images of the same names and labels, but their data differ "
                "elsewhere: other training images, or other content"
            )
        if not first.correct.keys() & second.correct.keys():
            notes.append(f"{first.name} and {second.name} share no seed: they are paired in the order of their seeds")
    return _adjust_p_values(pairings), notes


def _incomparable_reason(first: Contender, second: Contender) -> str:
    both = f"{first.name} and {second.name} are not compared image by image"
    for each in (first, second):
        if not each.correct:
            return f"{both}: {each.name} has no test predictions"
    if first.images == second.images:
        other = f"{both}: they are cross-validations with different folds (data.folds, data.split_seed)"
        return "" if _have_same_folds(first, second) else other
    shared = len(set(first.images) & set(second.images))
    return (
        f"{both}: they were tested on different images ({format_count(len(first.images))} and "
        f"{format_count(len(second.images))}, "
        f"of which {format_count(shared)} have the same name and label), so the difference of their figures "
        "means nothing"
    )


def _make_pairing(first: Contender, second: Contender) -> Pairing:
    shared = sorted(first.correct.keys() & second.correct.keys())
    if shared:
        before, after = ([each.correct[seed] for seed in shared] for each in (first, second))
    else:
        count = min(len(first.correct), len(second.correct))
        before, after = (list(each.correct.values())[:count] for each in (first, second))
    a, b = np.stack(before), np.stack(after)
    if len(a) == 1 and first.folds is None:
        return Pairing(first.name, second.name, 1, paired_interval(a[0], b[0]), float(mcnemar(a[0], b[0])["p"]))
    found = crossed_interval(a, b, folds=first.folds)
    folds = 0 if first.folds is None else int(first.folds.max()) + 1
    return Pairing(first.name, second.name, len(a), Interval(*found[:3]), found.p, folds=folds)


def _adjust_p_values(pairings: Sequence[Pairing]) -> list[Pairing]:
    """Adjust p for multiple comparisons by Holm's step-down procedure."""
    order = sorted(range(len(pairings)), key=lambda i: pairings[i].p)
    adjusted, highest = dict[int, float](), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(pairings) - rank) * pairings[i].p))
        adjusted[i] = highest
    return [replace(each, adjusted=adjusted[i]) for i, each in enumerate(pairings)]


def pairing_row(pairing: Pairing) -> dict[str, Any]:
    """Return a row of the page; a verdict needs ``MIN_SEEDS`` seeds or ``MIN_FOLDS`` folds, and adjusted p < 0.05."""
    low, high = pairing.gain.low, pairing.gain.high
    if pairing.folds and pairing.folds < MIN_FOLDS:
        verdict = f"too few folds for a verdict: {MIN_FOLDS} or more are needed"
    elif pairing.seeds < MIN_SEEDS and not pairing.folds:
        verdict = f"too few seeds for a verdict: {MIN_SEEDS} or more are needed"
    elif (low > 0 or high < 0) and pairing.adjusted < 0.05:
        verdict = f"{pairing.second if pairing.gain.value > 0 else pairing.first} is better"
    else:
        verdict = "no clear difference"
    return {
        "first": pairing.first,
        "second": pairing.second,
        "gain": format_points(pairing.gain.value),
        "interval": f"{format_points(low)} to {format_points(high)}",
        "count": format_count(pairing.seeds),
        "p": format_decimal(pairing.adjusted, 3),
        "verdict": verdict,
    }
