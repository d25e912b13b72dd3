"""The page that compares several runs, and paired comparisons on the same test images, image by image, seed by seed."""

import csv
import io
import itertools
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
from potstill.evaluation.significance import Interval, crossed_interval, mcnemar, paired_interval
from potstill.experiment.resume import describe_view_difference, flatten_settings, is_result_neutral
from potstill.experiment.run_folder import RunFolder
from potstill.experiment.verdict import MIN_FOLDS, MIN_SEEDS, average_over_seeds, seeds_count
from potstill.formatting import (
    MISSING,
    format_count,
    format_decimal,
    format_number,
    format_percent,
    format_points,
    format_scaled,
)
from potstill.io import read_bytes, unescape_cell, write_text
from potstill.report.advice import final_metric
from potstill.report.render import render_template
from potstill.report.run_reader import Run, StageResult, read_predictions, read_run
from potstill.report.text_reports import gain_with_interval

_ABSENT = object()  # a setting that a recipe does not have


@dataclass(frozen=True)
class Contender:
    """A run with its distilled students, by seed; the baselines where there is no distilled student."""

    name: str
    students: Mapping[int, StageResult]
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
    title = f"{format_count(len(found))} run{'s' if len(found) > 1 else ''} compared"
    contenders = [read_contender(_run_label(run), run) for run in found]
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
    values |= {"pairings": [pairing_row(each) for each in pairings], "notes": notes}
    values |= {"seeds": _seed_table(contenders), "differing": _different_settings(found)}
    write_text(target, render_template("compare.html.j2", values))
    return target


def _run_label(run: Run) -> str:
    label = _method_or_stage(run)
    return f"{run.name} ({label})" if label else run.name


def _method_or_stage(run: Run) -> str:
    """Return a run's method if it has a distilled student, else its last stage."""
    return run.method if "distilled" in run.stages else next((name for name in STAGES[::-1] if name in run.stages), "")


def _different_settings(runs: Sequence[Run]) -> dict[str, Any] | None:
    if len(runs) < 2:
        return None
    recipes = [flatten_settings(_read_recipe(run)) for run in runs]
    keys = [
        key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if key and not is_result_neutral(key)
    ]
    rows = []
    for key in keys:
        values = [recipe.get(key, _ABSENT) for recipe in recipes]
        if any(value != values[0] for value in values) and any(value not in (_ABSENT, None, []) for value in values):
            rows.append((key, ["" if value is _ABSENT else format_value(value) for value in values]))
    return {"names": [_run_label(run) for run in runs], "rows": rows}


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
            views, others = (each.students[seed].facts.get("views") for each in (first, other))
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
        top1 = {seed: _test_metric(stage, "top1") for seed, stage in each.students.items()}
        known = [value for value in top1.values() if value is not None]
        deviation = f" ± {format_points(statistics.stdev(known), signed=False)}" if len(known) > 1 else ""
        mean = format_percent(statistics.fmean(known)) + deviation if known else MISSING
        rows.append((each.name, [format_percent(top1.get(seed)) for seed in seeds], mean))
    return {"seeds": [str(seed) for seed in seeds], "rows": rows}


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


def _test_metric(stage: StageResult, key: str) -> float | None:
    return format_number(stage.metrics.get("test", {}).get(key))


MAX_ALL_PAIRS = 6  # contenders up to which all pairs are compared; of more, each with the first


def stages_by_seed(run: Run, role: str) -> dict[int, StageResult]:
    """Return the stages of a role by seed, including the run's further seeds."""
    first = int(format_number(run.results.get("seed")) or 0)
    named = {name: stage for name, stage in (run.repeats | run.stages).items() if stage.role == role}
    return dict(
        sorted(((first + repeat_index(name), stage) for name, stage in named.items()), key=lambda each: each[0])
    )


def read_contender(name: str, run: Run) -> Contender:
    """Read the test predictions of a run's students; seeds with other images than the first are left out."""
    students = stages_by_seed(run, "distilled") or stages_by_seed(run, "baseline")
    images: tuple[tuple[str, str], ...] = ()
    correct: dict[int, Array] = {}
    for seed, stage in students.items():
        found = read_predictions(stage, "test")
        if found is None:
            continue
        labels = [found.class_names[label] for label in found.labels]
        seed_images = tuple(zip(found.paths, labels, strict=True))
        images = images or seed_images
        if seed_images == images:
            correct[seed] = np.asarray(found.predicted) == np.asarray(found.labels)
    folds = _read_folds(run, [path for path, _ in images]) if run.folds and images else None
    return Contender(name, students, images, correct, str(run.data.get("fingerprint") or ""), folds)


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
