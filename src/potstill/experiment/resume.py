"""Continuity of a run folder: checks that a run may resume, replace or reuse it (same recipe, images, baseline,
views), and the record of how often its test split was evaluated and what was trained after that.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from potstill.config.overrides import WITHOUT_FILE
from potstill.config.recipe import Recipe, dump_recipe, load_recipe
from potstill.config.settings_errors import parse_settings
from potstill.data.splits import DataSplits
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.plan import PlannedStage, plan_stages, stage_recipe
from potstill.experiment.run_folder import RunFolder, as_csv
from potstill.formatting import format_names
from potstill.io import read_bytes, read_checksummed_json

TEST_EVALUATIONS_KEY = "looks"  # in environment.json


def record_test_evaluation(folder: RunFolder, recipe: Recipe, planned: Sequence[PlannedStage]) -> None:
    """Record in environment.json that the test split is about to be evaluated.

    The record is written before the first test image is read, so that a run that was killed meanwhile counts too.
    Evaluating the same stages of the same lengths again (after an interruption) is no further look.
    """
    look = {
        "seeds": recipe.seeds,
        "epochs": recipe.stage_training("student").epochs,
        "stages": [stage.name for stage in planned],
    }
    before = recorded_test_evaluations(folder)
    if not before or before[-1] != look:
        folder.add_to_environment({TEST_EVALUATIONS_KEY: [*before, look]})


def recorded_test_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """The looks recorded in environment.json, the first one first."""
    return list(folder.read_environment().get(TEST_EVALUATIONS_KEY) or []) if folder.environment.exists() else []


def describe_test_evaluations(
    looks: Sequence[dict[str, Any]], recipe: Recipe, planned: Sequence[PlannedStage]
) -> dict[str, Any]:
    """``looks`` of results.json.

    Args:
        looks: as recorded, the present one last.
        recipe: of the run.
        planned: its stages.

    Returns:
        ``test_evaluations``: how often different sets of trained stages were evaluated on test; ``seeds``, and of them
        ``seeds_at_first_look`` and ``seeds_added_after_look``; ``epochs_added_after_look``; ``test_every_epoch``:
        whether test curves were drawn while training; ``augmentation_seeds``: how many different ones the seeds have
        (1: no seed varies the views).
    """
    first, last = looks[0], looks[-1]
    seeds = {
        stage_recipe(recipe, stage).augmentation_seed for stage in planned if stage.role in ("baseline", "distilled")
    }
    return {
        "test_evaluations": len(looks),
        "seeds": last["seeds"],
        "seeds_at_first_look": first["seeds"],
        "seeds_added_after_look": max(0, last["seeds"] - first["seeds"]),
        "epochs_added_after_look": max(0, last["epochs"] - first["epochs"]),
        "test_every_epoch": any(recipe.stage_training(stage.name).evaluate_test_every_epoch for stage in planned),
        "augmentation_seeds": max(1, len(seeds)),
    }


def describe_view_difference(first: str, views: Any, second: str, others: Any) -> str:
    """A sentence on two trainings that were not on the same views of the training images; "" where they were.

    Args:
        first: what the first training is called.
        views: of its stage, as ``loaders.views_seen`` gives them; None where they were not recorded.
        second: what the second training is called.
        others: its views.

    Example:
        >>> few = {"count": 8, "augmentation_seed": 0, "sha256": "a"}
        >>> describe_view_difference("a", few, "b", few)
        ''
        >>> print(describe_view_difference("a", few, "b", {"count": 12, "augmentation_seed": 3, "sha256": "b"}))
        a and b were not trained on the same views of the images (8 views and 12 views; augmentation seeds 0 and \
3), so their difference is not that of the method alone
        >>> print(describe_view_difference("a", few, "b", None))
        whether a and b were trained on the same views of the images is not recorded
    """
    if not isinstance(views, dict) or not isinstance(others, dict):
        return f"whether {first} and {second} were trained on the same views of the images is not recorded"
    if views.get("sha256") == others.get("sha256"):
        return ""
    differ = []
    if views.get("count") != others.get("count"):
        differ.append(f"{views.get('count')} views and {others.get('count')} views")
    if views.get("augmentation_seed") != others.get("augmentation_seed"):
        differ.append(f"augmentation seeds {views.get('augmentation_seed')} and {others.get('augmentation_seed')}")
    how = "; ".join(differ) or "other images, another input size or another augmentation"
    return (
        f"{first} and {second} were not trained on the same views of the images ({how}), so their difference is not "
        "that of the method alone"
    )


# Settings that do not touch the result, so a resumed run may change them; those of training stand in several places.
_NEUTRAL_KEYS = {"name", "description", "data.workers", "data.cache_fraction", "teacher_cache.folder"}
_MAX_CHANGES = 8  # changes that are named
_MAX_IMAGES = 3  # images that are
_NEUTRAL_TRAINING_KEYS = ("checkpoint_seconds", "keep_checkpoint")
_NEUTRAL_SECTION = "tracker"  # who else gets the figures


def check_same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the same run; it may have more seeds, and more epochs in every stage."""
    former = _with_defaults(yaml.safe_load(folder.read_recipe()))
    before = flatten_settings(former)
    after = flatten_settings(yaml.safe_load(dump_recipe(recipe)))
    changed = [
        f"  {key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not is_result_neutral(key)
    ]
    if before.get("seeds", 1) < after["seeds"]:  # more of them only add stages
        changed = [line for line in changed if not line.startswith("  seeds:")]
    if _only_extends(folder, former, recipe):
        changed = [line for line in changed if not line.partition(":")[0].endswith("training.epochs")]
    if changed:
        more = [f"  and {len(changed) - _MAX_CHANGES} more"] if len(changed) > _MAX_CHANGES else []
        raise UsageError(
            f"--resume goes on with the same recipe, but {folder.recipe} has other settings:\n"
            + "\n".join(changed[:_MAX_CHANGES] + more)
            + "\nResume without these changes, or start another run with --name"
        )


def extended_stages(folder: RunFolder, recipe: Recipe, planned: Iterable[PlannedStage]) -> dict[str, list[int]]:
    """The stages that are done and that the recipe now trains longer, with the lengths that they had so far.

    Raises:
        UsageError: such a stage is that of another run.
    """
    found: dict[str, list[int]] = {}
    for stage in planned:
        if not folder.trained(stage.name):
            continue
        training = _training_facts(folder, stage)
        epochs, now = _planned_epochs(folder, stage), recipe.stage_training(stage.name).epochs
        if epochs is None or epochs >= now:
            continue
        if other := _model_facts(folder, stage).get("reused_from"):
            raise UsageError(
                f"{stage.name} is that of {other}, which --baseline has taken: extend that run first, and begin "
                "this one anew with another --name"
            )
        found[stage.name] = [*training.get("extended_from", []), epochs]
    return found


def check_same_baseline(folder: RunFolder, recipe: Recipe, data: DataSplits) -> None:
    """The baseline of another run may stand for this run's where it would be trained in the same way.

    Args:
        folder: of the other run.
        recipe: of this run, with its number of views.
        data: of this run.

    Raises:
        UsageError: there is no baseline, or a setting of its training differs; names them.
        ArtifactError: a damaged file.
    """
    if not folder.known or not folder.trained("baseline"):
        raise UsageError(f"--baseline {folder.path}: there is no trained baseline; give the folder of a run with one")
    theirs = _baseline_settings(load_recipe(folder.recipe, data_needed=False, recorded=True))
    theirs["images"] = folder.read_environment().get("data_fingerprint")
    ours = _baseline_settings(recipe) | {"images": data.fingerprint}
    if ours == theirs:
        return
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    lines = [
        f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" if key != "images" else "  images: other ones"
        for key in keys
    ]
    more = [f"  and {len(lines) - _MAX_CHANGES} more"] if len(lines) > _MAX_CHANGES else []
    raise UsageError(
        f"--baseline {folder.path} was trained otherwise than this run's baseline would be:\n"
        + "\n".join(lines[:_MAX_CHANGES] + more)
        + "\nMake these settings equal, or leave --baseline out"
    )


def check_same_data(folder: RunFolder, data: DataSplits) -> None:
    """A resumed run must see the same images."""
    before = folder.read_environment().get("data_fingerprint")
    if before != data.fingerprint:
        raise UsageError(
            f"--resume goes on with the same images, but {data.source} has changed since {folder.path} began:\n"
            + "\n".join(changed_images(folder, data.as_rows()))
            + "\nPut the former images back, or start another run with --name"
        )


def changed_images(folder: RunFolder, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines that name what differs between a run's splits.csv and the images that are there now.

    Args:
        folder: the run's.
        rows: (split, name, class) of every image now.
    """
    try:
        known = _rows_by_name(read_bytes(folder.path / "splits.csv").decode("utf-8", "replace"))
    except (ArtifactError, csv.Error):
        return ["  which of them is not known: splits.csv cannot be read"]
    found = _rows_by_name(as_csv(("split", "name", "class"), rows))
    told = {
        "gone": known.keys() - found.keys(),
        "new": found.keys() - known.keys(),
        "in another split or class": {name for name in known.keys() & found.keys() if known[name] != found[name]},
    }
    lines = [f"  {what}: {format_names(sorted(names), _MAX_IMAGES)}" for what, names in told.items() if names]
    return lines or ["  all names are the same: the content of an image differs"]


def check_weights_outside(folder: RunFolder, recipe: Recipe) -> None:
    """--overwrite must not delete what the new run is to start from."""
    for name in (*(stage.name for stage in plan_stages(recipe)), "student"):
        weights = recipe.network(name).weights
        if weights and weights not in WITHOUT_FILE and Path(weights).resolve().is_relative_to(folder.path.resolve()):
            raise UsageError(f"--overwrite would delete the {name}'s own weights, {weights}; choose another --name")


def _only_extends(folder: RunFolder, before: Any, recipe: Recipe) -> bool:
    """Whether no stage has fewer epochs than before, and none is in the midst of them: its schedule is fixed."""
    former, _ = parse_settings(before, Recipe)
    if former is None:
        return False
    for stage in plan_stages(former):
        epochs, path = former.stage_training(stage.name).epochs, folder.stage(stage.name)
        if recipe.stage_training(stage.name).epochs < epochs:
            return False
        if not folder.trained(stage.name) and (path / "checkpoints" / "last.checkpoint").exists():
            return False
        if folder.trained(stage.name) and (_planned_epochs(folder, stage) or epochs) < epochs:
            return False
    return True


def _planned_epochs(folder: RunFolder, stage: PlannedStage) -> int | None:
    """Of a stage that is done; None of a ready-made teacher."""
    found = _training_facts(folder, stage).get("planned_epochs")
    return found if isinstance(found, int) else None


def _training_facts(folder: RunFolder, stage: PlannedStage) -> dict[str, Any]:
    return _model_facts(folder, stage).get("training") or {}


def _model_facts(folder: RunFolder, stage: PlannedStage) -> dict[str, Any]:
    return read_checksummed_json(folder.stage(stage.name) / "model.json").get("facts") or {}


def _baseline_settings(recipe: Recipe) -> dict[str, Any]:
    """All settings that a baseline depends on, by their keys."""
    value = yaml.safe_load(dump_recipe(recipe))
    settings = {key: value[key] for key in ("seed", "data", "student")}
    settings["training"] = recipe.stage_training("baseline").model_dump(mode="json")
    settings["student"] = {key: each for key, each in settings["student"].items() if key != "training"}
    settings["teacher_cache"] = {"views": value["teacher_cache"]["views"]}
    unlike = ("data.unlabeled", "student.precision")  # for who has a teacher, and for teachers
    return {
        key: each
        for key, each in flatten_settings(settings).items()
        if not is_result_neutral(key) and not key.startswith(unlike)
    }


def is_result_neutral(key: str) -> bool:
    """Whether a setting, by its dotted key, does not touch the result."""
    section, _, name = key.rpartition(".")
    of_training = section.split(".")[-1] == "training" and name in _NEUTRAL_TRAINING_KEYS
    return key in _NEUTRAL_KEYS or of_training or key.split(".")[0] == _NEUTRAL_SECTION


def _with_defaults(value: Any) -> Any:
    """A recipe's plain values with today's defaults for settings that it is too old to know."""
    found, _ = parse_settings(value, Recipe)
    return value if found is None else yaml.safe_load(dump_recipe(found))


def flatten_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings of a recipe's plain value by their dotted keys."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))  # networks or methods, one by one
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {
        key: leaf for name, part in value.items() for key, leaf in flatten_settings(part, f"{prefix}{name}.").items()
    }


def _rows_by_name(text: str) -> dict[str, list[str]]:
    """Rows of splits.csv by the name of the image; one that stands twice counts once."""
    return {row[1]: row for row in csv.reader(io.StringIO(text)) if len(row) == 3}
