"""Checks that a run may resume, replace or reuse a run folder, and the record of its evaluations on test."""

import csv
import io
import itertools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from potstill.code_references import digest_code
from potstill.config.overrides import WITHOUT_FILE
from potstill.config.recipe import Recipe, dump_recipe, load_recipe
from potstill.config.settings_errors import parse_settings
from potstill.config.yaml import parse_yaml
from potstill.data.image_sets import ImageSet, short_digests
from potstill.data.splits import DataSplits, SplitRow
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.plan import PlannedStage, plan_stages, stage_recipe
from potstill.experiment.run_folder import SPLITS_FILE, SPLITS_HEADER, RunFolder
from potstill.formatting import format_names
from potstill.hub import model_path
from potstill.io import as_csv, check_exists, encode_text, read_bytes, read_checksummed_json, unescape_cell

TEST_EVALUATIONS_KEY = "looks"  # in environment.json


def record_test_evaluation(folder: RunFolder, recipe: Recipe, planned: Sequence[PlannedStage]) -> None:
    """Record in environment.json, before the first test image is read, that the split is about to be evaluated.

    Evaluating the same stages with the same numbers of epochs again does not count.
    """
    evaluation = {
        "seeds": recipe.seeds,
        "epochs": recipe.stage_training("student").epochs,
        "stages": [stage.name for stage in planned],
    }
    before = recorded_test_evaluations(folder)
    if not before or before[-1] != evaluation:
        folder.add_to_environment({TEST_EVALUATIONS_KEY: [*before, evaluation]})


def recorded_test_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the evaluations on test that environment.json records, oldest first."""
    return list(folder.read_environment().get(TEST_EVALUATIONS_KEY) or []) if folder.environment.exists() else []


def describe_test_evaluations(
    evaluations: Sequence[dict[str, Any]], recipe: Recipe, planned: Sequence[PlannedStage]
) -> dict[str, Any]:
    """Return ``looks`` of results.json: how often, and with which seeds and epochs, test was evaluated."""
    first, last = evaluations[0], evaluations[-1]
    seeds = {
        stage_recipe(recipe, stage).augmentation_seed for stage in planned if stage.role in ("baseline", "distilled")
    }
    return {
        "test_evaluations": len(evaluations),
        "seeds": last["seeds"],
        "seeds_at_first_look": first["seeds"],
        "seeds_added_after_look": max(0, last["seeds"] - first["seeds"]),
        "epochs_added_after_look": max(0, last["epochs"] - first["epochs"]),
        "test_every_epoch": any(recipe.stage_training(stage.name).evaluate_test_every_epoch for stage in planned),
        "augmentation_seeds": max(1, len(seeds)),
    }


def describe_view_difference(first: str, views: Any, second: str, others: Any) -> str:
    """Return a sentence if two stages were not trained on the same views (``describe_training_views``); else "".

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
    difference = "; ".join(differ) or "other images, another input size or another augmentation"
    return (
        f"{first} and {second} were not trained on the same views of the images ({difference}), so their difference is "
        "not that of the method alone"
    )


# Settings that do not affect the result, so that a resumed run may change them.
_NEUTRAL_KEYS = {
    "name",
    "description",
    "teacher_below_baseline",
    "data.workers",
    "data.cache_fraction",
    "teacher_cache.folder",
}
_MAX_CHANGES = 8  # changed settings that a message lists
_MAX_IMAGES = 3  # images that a message lists
_NEUTRAL_TRAINING_KEYS = ("checkpoint_seconds", "keep_checkpoint")
_NEUTRAL_SECTION = "tracker"


def check_same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Check that a resumed run has the same recipe; it may have more seeds, and more epochs in every stage."""
    former = _with_defaults(parse_yaml(folder.read_recipe(), str(folder.recipe)).value)
    plain = _plain_settings(recipe)
    changed = changed_settings(former, plain)
    if former.get("seeds", 1) < plain["seeds"]:  # more of them only add stages
        changed = [line for line in changed if not line.startswith("  seeds:")]
    if _only_extends(folder, former, recipe):
        changed = [line for line in changed if not line.partition(":")[0].endswith("training.epochs")]
    if changed:
        weights = flatten_settings(former).get("teacher.weights")
        again = ""
        if weights and any(line.startswith("  teacher.weights:") for line in changed):
            again = f" (give --teacher {shlex.quote(weights)} again)"
        raise UsageError(
            f"--resume needs the same recipe, but {folder.recipe} has other settings:\n"
            + first_lines(changed)
            + f"\nResume without these changes{again}, "
            "start another run with --name, or replace this one with --overwrite"
        )


def extended_stages(folder: RunFolder, recipe: Recipe, planned: Iterable[PlannedStage]) -> dict[str, list[int]]:
    """Return the finished stages that now get more epochs, with their numbers of epochs so far."""
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
                f"{stage.name} was taken from {other} by --baseline: extend that run first, and start this one again "
                "with another --name"
            )
        found[stage.name] = [*training.get("extended_from", []), epochs]
    return found


def check_same_baseline(folder: RunFolder, recipe: Recipe, data: DataSplits) -> None:
    """Check that the baseline of another run was trained as this run's would be."""
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
    raise UsageError(
        f"--baseline {folder.path} was not trained as this run's baseline would be:\n"
        + first_lines(lines)
        + "\nMake these settings equal, or leave --baseline out"
    )


def first_lines(lines: Sequence[str]) -> str:
    """Return the first differences of many, for a message, and how many more there are."""
    more = [f"  and {len(lines) - _MAX_CHANGES} more"] if len(lines) > _MAX_CHANGES else []
    return "\n".join([*lines[:_MAX_CHANGES], *more])


def check_same_data(folder: RunFolder, data: DataSplits) -> None:
    """Check that a resumed run has the same images."""
    before = folder.read_environment().get("data_fingerprint")
    if before != data.fingerprint:
        raise UsageError(
            f"--resume needs the same images, but {data.source} has changed since {folder.path} was started:\n"
            + "\n".join(changed_images(folder, data.as_rows()))
            + "\nRestore the former images, or start another run with --name"
        )


def changed_code(folder: RunFolder, recipe: Recipe) -> list[str]:
    """Return a warning for each piece of the user's code that a run names and that was edited since it was started."""
    now = digest_code(recipe.model_dump(mode="json"))
    before = folder.read_environment().get("code") or {}
    return [
        f"{name} has changed since {folder.path} was started: what was trained before that, and what is trained now, "
        "come of different code; to compare them, start another run with --name"
        for name, digest in before.items()
        if name in now and now[name] != digest
    ]


def changed_images(folder: RunFolder, rows: Iterable[SplitRow]) -> list[str]:
    """Return lines on the differences between a run's splits.csv and the present images."""
    try:
        known = _rows_by_name(read_bytes(folder.path / SPLITS_FILE))
    except (ArtifactError, csv.Error, ValueError):
        return ["  the changed images are unknown: splits.csv cannot be read"]
    found = _rows_by_name(encode_text(as_csv(SPLITS_HEADER, rows)))
    both = known.keys() & found.keys()
    changes = {
        "gone": known.keys() - found.keys(),
        "new": found.keys() - known.keys(),
        "in another split or class": {name for name in both if known[name][:2] != found[name][:2]},
        "of other content": {name for name in both if known[name][2] != found[name][2]},
    }
    lines = [f"  {what}: {format_names(sorted(names), _MAX_IMAGES)}" for what, names in changes.items() if names]
    return lines or ["  the names are the same, but the content of an image differs"]


def images_used_before(
    run: Path, tests: ImageSet, *, same_data: bool = False, is_target: bool = False, hidden: bool = False
) -> list[str]:
    """Return the names of the images of ``tests`` that a run has used in train or val; none without its splits.csv.

    Files are found by content, whatever their names are; with ``same_data``, other images by their names in the
    run's data.  ``is_target``: whether ``tests`` are of the run's target domain; ``hidden``: whether it had images
    whose labels were hidden, which are in no split.
    """
    try:
        rows = _rows_by_name(read_bytes(run / SPLITS_FILE))
    except (ArtifactError, csv.Error, ValueError):
        return []
    known: dict[str, str] = {}
    for name, (split, _, digest) in rows.items():
        key = f"sha256 {digest}" if digest else f"name {unescape_cell(name)}"
        if split.startswith("target ") == is_target and known.get(key) != "test":  # copies may be in two splits
            known[key] = split.removeprefix("target ")
    found = []
    for name, digest in zip(tests.names, short_digests(tests), strict=True):
        before = known.get(f"sha256 {digest}" if digest else f"name {name}")
        if before in ("train", "val") or (hidden and before is None):
            found.append((name, bool(digest)))
    return [name for name, is_file in found if is_file or same_data]


def check_weights_outside(folder: RunFolder, recipe: Recipe) -> None:
    """Check that ``--overwrite`` does not delete weights from which the new run starts."""
    for name in (*(stage.name for stage in plan_stages(recipe)), "student"):
        weights = recipe.network(name).weights
        if (
            weights
            and weights not in WITHOUT_FILE
            and model_path(weights).resolve().is_relative_to(folder.path.resolve())
        ):
            raise UsageError(
                f"--overwrite would delete the weights from which {name} starts, {weights}; choose another --name"
            )


def _only_extends(folder: RunFolder, before: Any, recipe: Recipe) -> bool:
    """Return whether no stage has fewer epochs than before, and no unfinished one (its schedule is fixed) more."""
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
    found = _training_facts(folder, stage).get("planned_epochs")
    return found if isinstance(found, int) else None


def _training_facts(folder: RunFolder, stage: PlannedStage) -> dict[str, Any]:
    return _model_facts(folder, stage).get("training") or {}


def _model_facts(folder: RunFolder, stage: PlannedStage) -> dict[str, Any]:
    return read_checksummed_json(folder.stage(stage.name) / "model.json").get("facts") or {}


def _baseline_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that affect a baseline, by dotted key."""
    value = _plain_settings(recipe)
    settings = {key: value[key] for key in ("seed", "data", "student")}
    settings["training"] = recipe.stage_training("baseline").model_dump(mode="json")
    settings["student"] = {key: each for key, each in settings["student"].items() if key != "training"}
    settings["teacher_cache"] = {"views": value["teacher_cache"]["views"]}
    if recipe.data.cache == "auto":  # of a run before there was a choice
        settings["data"] = settings["data"] | {"cache": "raw"}
    unused = ("data.unlabeled", "student.precision")  # by a stage without teacher
    return {
        key: each
        for key, each in flatten_settings(settings).items()
        if not is_result_neutral(key) and not key.startswith(unused)
    }


def changed_settings(before: Any, after: Any) -> list[str]:
    """Return a line for each setting that affects the result and differs between two recipes."""
    old, new = flatten_settings(before), flatten_settings(after)
    return [
        f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_result_neutral(key)
    ]


def is_result_neutral(key: str) -> bool:
    """Return whether a setting, given by its dotted key, does not affect the result."""
    section, _, name = key.rpartition(".")
    of_training = section.split(".")[-1] == "training" and name in _NEUTRAL_TRAINING_KEYS
    return key in _NEUTRAL_KEYS or of_training or key.split(".")[0] == _NEUTRAL_SECTION


def _plain_settings(recipe: Recipe) -> Any:
    return parse_yaml(dump_recipe(recipe), recipe.name).value


def _with_defaults(value: Any) -> Any:
    """Return a recipe's plain values, completed by the defaults of settings that it lacks."""
    recipe, _ = parse_settings(value, Recipe)
    return value if recipe is None else _plain_settings(recipe)


def flatten_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a recipe's plain values by dotted key."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))  # networks or methods, one by one
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {
        key: leaf for name, part in value.items() for key, leaf in flatten_settings(part, f"{prefix}{name}.").items()
    }


def _rows_by_name(content: bytes) -> dict[str, tuple[str, str, str]]:
    """Return name -> (split, class, sha256) of splits.csv."""
    rows = csv.reader(io.StringIO(content.decode("utf-8", "replace")))
    return {name: (split, label, digest) for split, name, label, digest in itertools.islice(rows, 1, None)}


def folder_of_baseline(path: Path, own: Path) -> RunFolder:
    """Return the run of ``--baseline``, given by its folder or that of its baseline."""
    check_exists(path, "the folder of a run for --baseline")
    path = path.parent if (path / "model.json").is_file() else path
    if path.resolve() == own.resolve():
        raise UsageError(f"--baseline {path} is this run itself; give another run, or continue this one with --resume")
    folder = RunFolder(path)
    if not folder.known or not folder.trained("baseline"):
        raise UsageError(f"--baseline {path}: there is no trained baseline; give the folder of a run with one")
    return folder
