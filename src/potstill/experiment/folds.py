"""Pool the runs of a cross-validation: each image is predicted by the models of the fold that has it in test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from potstill.config import repeat_index, sort_stages, stage_role
from potstill.config.overrides import WITHOUT_FILE
from potstill.config.recipe import Recipe
from potstill.data.splits import DataSplits
from potstill.errors import UsageError
from potstill.evaluation import Array
from potstill.evaluation.final_metrics import split_intervals
from potstill.evaluation.predictions import MAX_VALUES_IN_MEMORY, Predictions
from potstill.experiment.comparison import compare_with_baseline
from potstill.experiment.ensembles import ensemble_predictions
from potstill.experiment.examples import describe_examples
from potstill.experiment.plan import PlannedStage, plan_stages
from potstill.experiment.results import (
    describe_fidelity,
    describe_groups,
    describe_metrics,
    describe_run,
    without_per_class,
)
from potstill.experiment.run_folder import RunFolder

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
