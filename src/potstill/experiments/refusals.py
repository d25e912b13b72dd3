"""When a run must not go on with a folder, or replace it."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from potstill.artifacts import read_bytes
from potstill.data.splits import DataSplits
from potstill.errors import ArtifactError, UsageError
from potstill.experiments.plan import Planned, plan
from potstill.experiments.recipe import Recipe, dump_recipe, load_recipe
from potstill.experiments.run_folder import RunFolder, as_csv
from potstill.experiments.settings_errors import parse
from potstill.sealed import read_sealed_json

# Settings that do not touch the result, so a resumed run may change them; those of training stand in several places.
_FREE = {"name", "description", "data.workers", "data.memory_share", "store.folder"}
_SHOWN = 8  # changes that are named
_NAMED = 3  # images that are
_FREE_OF_TRAINING = ("checkpoint_seconds", "keep_checkpoint")
_FREE_SECTION = "tracker"  # who else gets the figures


def refuse_changes(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the same run; it may have more seeds, and more epochs in every stage."""
    former = _complete(yaml.safe_load(folder.read_recipe()))
    before = flat(former)
    after = flat(yaml.safe_load(dump_recipe(recipe)))
    changed = [
        f"  {key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not is_free(key)
    ]
    if before.get("seeds", 1) < after["seeds"]:  # more of them only add stages
        changed = [line for line in changed if not line.startswith("  seeds:")]
    if _longer(folder, former, recipe):
        changed = [line for line in changed if not line.partition(":")[0].endswith("training.epochs")]
    if changed:
        more = [f"  and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
        raise UsageError(
            f"--resume goes on with the same recipe, but {folder.recipe} has other settings:\n"
            + "\n".join(changed[:_SHOWN] + more)
            + "\nResume without these changes, or start another run with --name"
        )


def extended_stages(folder: RunFolder, recipe: Recipe, planned: Iterable[Planned]) -> dict[str, list[int]]:
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
        if other := _facts(folder, stage).get("reused_from"):
            raise UsageError(
                f"{stage.name} is that of {other}, which --baseline has taken: extend that run first, and begin "
                "this one anew with another --name"
            )
        found[stage.name] = [*training.get("extended_from", []), epochs]
    return found


def refuse_other_baseline(folder: RunFolder, recipe: Recipe, data: DataSplits) -> None:
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
    theirs = _of_baseline(load_recipe(folder.recipe, data_needed=False))
    theirs["images"] = folder.read_environment().get("data_fingerprint")
    ours = _of_baseline(recipe) | {"images": data.fingerprint}
    if ours == theirs:
        return
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    lines = [
        f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" if key != "images" else "  images: other ones"
        for key in keys
    ]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    raise UsageError(
        f"--baseline {folder.path} was trained otherwise than this run's baseline would be:\n"
        + "\n".join(lines[:_SHOWN] + more)
        + "\nMake these settings equal, or leave --baseline out"
    )


def refuse_other_data(folder: RunFolder, data: DataSplits) -> None:
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
        known = _by_name(read_bytes(folder.path / "splits.csv").decode("utf-8", "replace"))
    except (ArtifactError, csv.Error):
        return ["  which of them is not known: splits.csv cannot be read"]
    found = _by_name(as_csv(("split", "name", "class"), rows))
    told = {
        "gone": known.keys() - found.keys(),
        "new": found.keys() - known.keys(),
        "in another split or class": {name for name in known.keys() & found.keys() if known[name] != found[name]},
    }
    lines = [f"  {what}: {_few(sorted(names))}" for what, names in told.items() if names]
    return lines or ["  all names are the same: the content of an image differs"]


def refuse_own_weights(folder: RunFolder, recipe: Recipe) -> None:
    """--overwrite must not delete what the new run is to start from."""
    for name in (*(stage.name for stage in plan(recipe)), "student"):
        weights = recipe.network(name).weights
        if weights and Path(weights).resolve().is_relative_to(folder.path.resolve()):
            raise UsageError(f"--overwrite would delete the {name}'s own weights, {weights}; choose another --name")


def _longer(folder: RunFolder, before: Any, recipe: Recipe) -> bool:
    """Whether no stage has fewer epochs than before, and none is in the midst of them: its schedule is fixed."""
    former, _ = parse(before, Recipe)
    if former is None:
        return False
    for stage in plan(former):
        epochs, path = former.stage_training(stage.name).epochs, folder.stage(stage.name)
        if recipe.stage_training(stage.name).epochs < epochs:
            return False
        if not folder.trained(stage.name) and (path / "checkpoints" / "last.checkpoint").exists():
            return False
        if folder.trained(stage.name) and (_planned_epochs(folder, stage) or epochs) < epochs:
            return False
    return True


def _planned_epochs(folder: RunFolder, stage: Planned) -> int | None:
    """Of a stage that is done; None of a ready-made teacher."""
    found = _training_facts(folder, stage).get("planned_epochs")
    return found if isinstance(found, int) else None


def _training_facts(folder: RunFolder, stage: Planned) -> dict[str, Any]:
    return _facts(folder, stage).get("training") or {}


def _facts(folder: RunFolder, stage: Planned) -> dict[str, Any]:
    return read_sealed_json(folder.stage(stage.name) / "model.json").get("facts") or {}


def _of_baseline(recipe: Recipe) -> dict[str, Any]:
    """All settings that a baseline depends on, by their keys."""
    value = yaml.safe_load(dump_recipe(recipe))
    settings = {key: value[key] for key in ("seed", "data", "student")}
    settings["training"] = recipe.stage_training("baseline").model_dump(mode="json")
    settings["student"] = {key: each for key, each in settings["student"].items() if key != "training"}
    settings["store"] = {"views": value["store"]["views"]}
    unlike = ("data.unlabeled", "student.precision")  # for who has a teacher, and for teachers
    return {key: each for key, each in flat(settings).items() if not is_free(key) and not key.startswith(unlike)}


def is_free(key: str) -> bool:
    """Whether a setting, by its dotted key, does not touch the result."""
    section, _, name = key.rpartition(".")
    of_training = section.split(".")[-1] == "training" and name in _FREE_OF_TRAINING
    return key in _FREE or of_training or key.split(".")[0] == _FREE_SECTION


def _complete(value: Any) -> Any:
    """A recipe's plain values with today's defaults for settings that it is too old to know."""
    found, _ = parse(value, Recipe)
    return value if found is None else yaml.safe_load(dump_recipe(found))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings of a recipe's plain value by their dotted keys."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))  # networks or methods, one by one
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {key: leaf for name, part in value.items() for key, leaf in flat(part, f"{prefix}{name}.").items()}


def _by_name(text: str) -> dict[str, list[str]]:
    """Rows of splits.csv by the name of the image; one that stands twice counts once."""
    return {row[1]: row for row in csv.reader(io.StringIO(text)) if len(row) == 3}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
