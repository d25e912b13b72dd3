"""Cross-validation: a run for each fold, and their results pooled.

Each image is predicted by the models of the fold that has it in test.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.config import repeat_index, sort_stages, stage_role
from potstill.config.overrides import WITHOUT_FILE
from potstill.config.recipe import Recipe, load_recipe
from potstill.data.splits import DataSplits, fold_splits, pool_splits
from potstill.distributed.group import ProcessGroup
from potstill.errors import UsageError
from potstill.evaluation import Array
from potstill.evaluation.final_metrics import split_intervals
from potstill.evaluation.predictions import MAX_VALUES_IN_MEMORY, Predictions
from potstill.experiment.comparison import compare_with_baseline
from potstill.experiment.ensembles import ensemble_predictions
from potstill.experiment.estimate import estimate_stages
from potstill.experiment.examples import describe_examples
from potstill.experiment.plan import (
    PlannedStage,
    choose_networks,
    lengthen_short_trainings,
    plan_stages,
    restore_choices,
)
from potstill.experiment.preflight import check_all, choose_training_cache, create_stage_method, load_and_stage
from potstill.experiment.reproduce import write_beginning
from potstill.experiment.results import (
    describe_fidelity,
    describe_groups,
    describe_metrics,
    describe_run,
    without_per_class,
)
from potstill.experiment.resume import (
    check_same_baseline,
    check_same_data,
    check_same_recipe,
    check_weights_outside,
    describe_test_evaluations,
    folder_of_baseline,
    record_test_evaluation,
    recorded_test_evaluations,
)
from potstill.experiment.run_folder import RunFolder, open_run_folder
from potstill.experiment.teacher_cache import apply_view_plan, plan_views
from potstill.io import check_exists
from potstill.training.callbacks import Observer, OnceObserver, SilentObserver
from potstill.training.devices import create_compute

SEED_STEP = 1000  # from a fold to the next: no two folds and seeds share a seed, however many seeds are added
FOLD_METRICS = ("top1", "top3", "f1_macro", "auc_macro", "ece", "nll", "agreement", "kl_to_teacher")


def fold_recipe(recipe: Recipe, fold: int) -> Recipe:
    """Return the recipe of one fold, from 1, with seeds of its own: what a seed changes averages out over the folds."""
    data = recipe.data.model_copy(update={"fold": fold})
    return recipe.model_copy(update={"data": data, "seed": recipe.seed + SEED_STEP * (fold - 1)})


def is_finished(run: RunFolder, recipe: Recipe, planned: Sequence[PlannedStage]) -> bool:
    """Return whether the results of a fold are those of all planned stages, with all their epochs."""
    if not run.results.is_file():
        return False
    results = run.read_results()
    stopped = "not_distilled" in results and recipe.teacher_below_baseline == "stop"
    if not stopped and set(results["planned"]) != {stage.name for stage in planned}:
        return False
    trained = {name: entry["training"] for name, entry in (results["stages"] | results["repeats"]).items()}
    return all(
        facts is None or facts["planned_epochs"] >= recipe.stage_training(name).epochs
        for name, facts in trained.items()
    )


def check_poolable(data: DataSplits) -> None:
    """Check that the predictions for all images can be kept in memory."""
    assert data.pool is not None
    images, classes = len(data.pool.images), len(data.class_names)
    if images * classes > MAX_VALUES_IN_MEMORY:
        raise UsageError(
            f"--folds (data.folds) is for at most {MAX_VALUES_IN_MEMORY:,} images x classes, and here are {images:,} x "
            f"{classes:,}: leave it out; a test split of that many images is precise enough"
        )


def describe_outside_weights(recipe: Recipe) -> list[str]:
    """Return a warning for each network of the recipe that starts from a file, which may know test images."""
    names = [*dict.fromkeys(stage.name for stage in plan_stages(recipe) if not stage.repeat)]
    given = {
        "student" if stage_role(name) in ("baseline", "generation", "distilled") else name: recipe.network(name).weights
        for name in names
    }
    return [
        f"the {name} starts from {weights}, which no fold has trained: if it was trained on images of this data, it "
        "knows test images of every fold, and its figures, and those of what learns from it, are too good. Give the "
        f"architecture alone{', or ARCH@pretrained,' if name != 'student' else ''} to train one in each fold"
        for name, weights in given.items()
        if weights is not None and weights not in WITHOUT_FILE
    ]


class _FoldObserver(OnceObserver):
    """Shows the fold with each stage, the time of all folds, and every note and warning once."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(observer)
        self.fold = 0
        self.estimate: Callable[[], Mapping[str, float]] = dict
        self._expected = False

    def expect(self, estimate: Callable[[], Mapping[str, float]]) -> None:
        """Report the time of all folds, when the first begins; the estimate of a fold is not used."""
        if not self._expected:
            self._expected = True
            self.observer.expect(self.estimate)

    def stage(self, name: str, detail: str) -> None:
        super().stage(self._label(name), detail)

    def stage_end(self, name: str, seconds: float) -> None:
        super().stage_end(self._label(name), seconds)

    def _label(self, name: str) -> str:
        return f"fold {self.fold}/{name}"


def run_folds(
    run: Callable[..., Path],
    recipe: Recipe,
    path: Path,
    data: DataSplits | None,
    outer: Observer,
    processes: ProcessGroup,
    baseline: Path | None,
    *,
    resume: bool,
    overwrite: bool,
) -> Path:
    """Run the folds that are not finished, each by ``run`` in a folder within that of the whole; return the latter."""
    started, observer = time.monotonic(), _FoldObserver(outer)
    with open_run_folder(path.parent, path.name, processes, resume=resume, overwrite=overwrite) as folder:
        if resume:
            recipe = restore_choices(load_recipe(folder.recipe, data_needed=False, recorded=True), recipe)
            check_same_recipe(folder, recipe)
        if overwrite:
            check_weights_outside(folder, recipe)
        recipe, replaced = processes.share(choose_networks(recipe))
        if resume:
            replaced = replaced or folder.read_environment().get("replaced_networks", [])
        whole = recipe.data.model_copy(update={"folds": None, "unlabeled": None, "labels_per_class": None})
        data = pool_splits(load_and_stage(recipe, plan_stages(recipe), data, observer, whole))
        check_poolable(data)
        recipe = recipe.with_chosen_method(len(data.class_names))
        splits = fold_splits(data, fold_recipe(recipe, 1).data)
        planned, compute = plan_stages(recipe), create_compute(recipe.stage_training("student"), processes)
        cache_note = ""
        if not resume:
            recipe, cache_note = processes.share(choose_training_cache(recipe, planned, splits, compute))
        recipes = {fold: fold_recipe(recipe, fold) for fold in range(1, (recipe.data.folds or 0) + 1)}
        if resume:
            check_same_data(folder, data)
        first_seed = [stage for stage in planned if not stage.repeat]
        check_all(recipes[1], data, first_seed, SilentObserver(), processes)  # again in the fold, with its warnings
        if baseline is not None:
            _check_baselines_of_folds(baseline, folder, recipes[1], len(recipes), splits)
        processes.highest(0)  # a barrier, as in ``run``
        if processes.first:
            if overwrite:
                folder.clear()
            write_beginning(folder, recipe, data, compute, {}, replaced, resume=resume)
        observer.note(
            f"{len(recipes)} folds of {len(data.pool.images if data.pool else ()):,} images: each image is in test "
            "once, and teacher, baseline and distilled student are trained without it"
        )
        if cache_note:
            observer.note(cache_note)
        warnings = [*replaced, *describe_outside_weights(recipe)]
        for warning in warnings:
            observer.warn(warning)
        done = processes.share({fold for fold in recipes if is_finished(folder.fold(fold), recipe, planned)})
        left = {
            f"fold {fold}/{stage.name}": stage.name
            for fold in recipes
            for stage in planned
            if fold not in done and not (resume and folder.fold(fold).trained(stage.name))
        }

        def estimate() -> dict[str, float]:
            seconds = estimate_stages(recipe, planned, splits, compute)
            return {label: seconds[stage] for label, stage in left.items() if stage in seconds}

        observer.estimate = estimate
        for fold, own in recipes.items():
            observer.fold = fold
            if fold in done:
                observer.note(f"fold {fold}: already finished")
                continue
            known = processes.share(resume and folder.fold(fold).known)
            run(
                own,
                output_dir=folder.path,
                name=folder.fold(fold).path.name,
                resume=known,
                data=data,
                observer=observer,
                baseline=None if baseline is None else RunFolder(baseline).fold(fold).path,
            )
        if processes.first:
            record_test_evaluation(folder, recipe, planned)
            looks = describe_test_evaluations(recorded_test_evaluations(folder), recipe, planned)
            seconds = time.monotonic() - started
            folder.write_results(pool_folds(folder, recipe, data, looks=looks, seconds=seconds, warnings=warnings))
    return folder.path


def _check_baselines_of_folds(path: Path, folder: RunFolder, recipe: Recipe, folds: int, splits: DataSplits) -> None:
    """Check that the run of ``--baseline`` has the folds of this one; ``recipe`` and ``splits``: of fold 1."""
    check_exists(path, "the folder of a run for --baseline")
    if missing := [fold for fold in range(1, folds + 1) if not RunFolder(path).fold(fold).known]:
        has = f"has no fold {missing[0]}" if missing[0] > 1 else "is no cross-validation"
        raise UsageError(
            f"--baseline {path} {has}, and this run has {folds} folds: give a run with --folds {folds}, or leave "
            "--baseline out"
        )
    recipe = lengthen_short_trainings(recipe, len(splits.train))
    recipe = apply_view_plan(recipe, plan_views(recipe, create_stage_method(recipe), splits))
    check_same_baseline(folder_of_baseline(RunFolder(path).fold(1).path, folder.fold(1).path), recipe, splits)


def pool_folds(
    folder: RunFolder,
    recipe: Recipe,
    data: DataSplits,
    *,
    looks: Mapping[str, Any],
    seconds: float,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Write predictions, metrics and examples of all images, and return results.json of a cross-validation.

    The metrics of a stage are those of its predictions for all images, each by the models of its fold; what else is
    known of a stage is that of fold 1.
    """
    assert data.pool is not None
    assert recipe.data.folds is not None
    runs = [folder.fold(number) for number in range(1, recipe.data.folds + 1)]
    found = [run.read_results() for run in runs]
    facts = [results["stages"] | results["repeats"] for results in found]
    names = [name for name in facts[0] if all(name in each for each in facts)]
    pool, classes = data.pool.images, data.class_names
    position = {name: at for at, name in enumerate(pool.names)}
    fold_of = np.zeros(len(pool), dtype=np.int64)
    predictions: dict[str, Predictions] = {}
    for stage in names:
        probabilities = np.zeros((len(pool), len(classes)))
        for fold, (run, results) in enumerate(zip(runs, found, strict=True)):
            sha256 = str(results["files"][f"{stage}/predictions_test.csv"])
            rows = run.read_probabilities(stage, "test", sha256, classes)
            index = [position[name] for name in rows]
            probabilities[index], fold_of[index] = np.stack(list(rows.values())), fold
        predictions[stage] = Predictions.of(probabilities, np.asarray(pool.labels))
    evaluated = _describe_stages(folder, recipe, facts, predictions, fold_of, classes, pool.names, looks)
    examples = describe_examples({name: predictions[name] for name in evaluated["stages"]}, pool, classes)
    if examples is not None:
        folder.write_examples(examples)
    if stopped := [
        f"fold {at}: {each['not_distilled']}" for at, each in enumerate(found, 1) if "not_distilled" in each
    ]:
        evaluated["not_distilled"] = " ".join(stopped)
    described = describe_run(folder.path.name, recipe, data, found[0]["planned"], evaluated, seconds, [])
    counts = np.bincount(pool.labels, minlength=len(classes)).tolist()
    described["data"] |= {
        "counts": {"test": dict(zip(classes, counts, strict=True))},
        "origin": f"{recipe.data.folds} folds: each image is test in one of them; {data.origin}",
    }
    given = [[str(warning) for warning in results["warnings"]] for results in found]
    of_all = [warning for warning in given[0] if all(warning in each for each in given)]
    of_some = [f"fold {at}: {text}" for at, each in enumerate(given, 1) for text in each if text not in of_all]
    return described | {
        "folds": [
            _describe_fold(at, run, results) for at, (run, results) in enumerate(zip(runs, found, strict=True), 1)
        ],
        "warnings": list(dict.fromkeys([*warnings, *of_all, *of_some])),
    }


def _describe_stages(
    folder: RunFolder,
    recipe: Recipe,
    facts: Sequence[Mapping[str, Any]],
    predictions: dict[str, Predictions],
    fold_of: Array,
    classes: tuple[str, ...],
    names: Sequence[str],
    looks: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the files of each stage; return ``stages`` to ``comparison`` of results.json."""
    once = [name for name in predictions if not repeat_index(name)]
    groups = ensemble_predictions({name: {"test": predictions[name]} for name in once}, recipe.teachers)
    entries: dict[str, Any] = {}
    for name, own in predictions.items():
        metrics = describe_metrics(own, classes)
        if stage_role(name) not in ("teacher", "baseline") and "teachers" in groups:
            metrics |= describe_fidelity(own, groups["teachers"]["test"])
        folder.write_metrics(name, {"test": metrics})
        folder.write_confusion(name, "test", own, classes)
        folder.write_predictions(name, "test", names, own, classes)
        dropped = ("train", "val", "calibration")
        entries[name] = {key: value for key, value in facts[0][name].items() if key not in dropped} | {
            "test": without_per_class(metrics),
            "test_intervals": split_intervals(own),
            "over_folds": _over_folds([_test_over_seeds(each, name) for each in facts]),
        }
    stages = {name: entries.pop(name) for name in once}
    together = describe_groups(groups, once, classes)
    tests = predictions | {name: own["test"] for name, own in groups.items()}
    correct = {name: own.correct for name, own in tests.items()}
    known = {"looks": dict(looks)}
    comparison = None
    if {"baseline", "distilled"} <= stages.keys():
        comparison = compare_with_baseline(stages, correct, together, entries, recipe.seed, None, known, fold_of)
    return {"stages": stages, "repeats": entries, "together": together, "comparison": comparison, **known}


def _test_over_seeds(stages: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """Return a stage's metrics in one fold; of baseline and distilled, the mean over the seeds, as in the verdict."""
    same = [each for each in stages if stage_role(each) == name] if name in ("baseline", "distilled") else [name]
    values = {key: [stages[each]["test"].get(key) for each in same] for key in FOLD_METRICS}
    return {key: None if None in found else float(np.mean(found)) for key, found in values.items()}


def _over_folds(tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation of each metric over the folds."""
    found = {}
    for key in FOLD_METRICS:
        values = [test[key] for test in tests if test.get(key) is not None]
        if len(values) == len(tests):
            found[key] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
    return found


def _describe_fold(number: int, run: RunFolder, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fold's row: its folder, its test images, and top-1, the mean over its seeds."""
    stages, every = results["stages"], results["stages"] | results["repeats"]
    return {
        "fold": number,
        "folder": run.path.name,
        "seed": results["seed"],
        "images": sum(results["data"]["counts"]["test"].values()),
        "top1": {name: _test_over_seeds(every, name)["top1"] for name in sort_stages(stages)},
    }
