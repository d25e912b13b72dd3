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
from potstill.experiments.plan import plan
from potstill.experiments.recipe import Recipe, dump_recipe
from potstill.experiments.run_folder import RunFolder, as_csv
from potstill.experiments.settings_errors import parse

# Settings that do not touch the result, so a resumed run may change them; the last stands in several places.
_FREE = {"name", "description", "data.workers", "data.memory_share", "store.folder"}
_SHOWN = 8  # changes that are named
_NAMED = 3  # images that are
_FREE_ANYWHERE = "training.checkpoint_seconds"
_FREE_SECTION = "tracker"  # who else gets the figures


def refuse_changes(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the same run."""
    before = _flat(_complete(yaml.safe_load(folder.read_recipe())))
    after = _flat(yaml.safe_load(dump_recipe(recipe)))
    changed = [
        f"  {key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_free(key)
    ]
    if before.get("seeds", 1) < after["seeds"]:  # more of them only add stages
        changed = [line for line in changed if not line.startswith("  seeds:")]
    if changed:
        more = [f"  and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
        raise UsageError(
            f"--resume goes on with the same recipe, but {folder.recipe} has other settings:\n"
            + "\n".join(changed[:_SHOWN] + more)
            + "\nResume without these changes, or start another run with --name"
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


def _is_free(key: str) -> bool:
    return key in _FREE or key.endswith(_FREE_ANYWHERE) or key.split(".")[0] == _FREE_SECTION


def _complete(value: Any) -> Any:
    """A recipe's plain values with today's defaults for settings that it is too old to know."""
    found, _ = parse(value, Recipe)
    return value if found is None else yaml.safe_load(dump_recipe(found))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))  # networks or methods, one by one
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}{name}.").items()}


def _by_name(text: str) -> dict[str, list[str]]:
    """Rows of splits.csv by the name of the image; one that stands twice counts once."""
    return {row[1]: row for row in csv.reader(io.StringIO(text)) if len(row) == 3}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
