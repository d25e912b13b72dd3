"""What a sweep is and came to, in files that are read without Optuna: sweep.json, trials.json, final.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from potstill.errors import UsageError
from potstill.experiments.recipe import Recipe, dump_recipe
from potstill.experiments.sweep.space import Space
from potstill.sealed import read_sealed_json, write_sealed_json

SWEEP, TRIALS, FINAL = "sweep.json", "trials.json", "final.json"
CONFIRMATION = "confirmation.json"  # once winner and baseline were trained again on fresh seeds
SLURM = "slurm"  # a folder: what SLURM jobs print
_SHOWN = 8  # differences that are named
_FREE = ("data.workers", "data.memory_share", "store.folder", "training.checkpoint_seconds")


def describe(recipe: Recipe, space: Space, fingerprint: str, *, grid: bool, trials: int) -> dict[str, Any]:
    """All that every process of one study must agree on, and how many trials are wanted."""
    return {
        "schema": 1,
        "recipe": dump_recipe(recipe),
        "data": fingerprint,
        "space": [dimension.facts() | {"text": str(dimension)} for dimension in space.dimensions],
        "grid": grid,
        "trials": trials,
        "measure": recipe.stage_training("distilled").selection_metric,
    }


def agree(folder: Path, wanted: dict[str, Any]) -> None:
    """Begin a study, or join the one that is there; the sweep's lock must be held.

    Raises:
        UsageError: it is another study; names what differs.
        ArtifactError: sweep.json is damaged.
    """
    path = folder / SWEEP
    if not path.exists():
        if any(not entry.name.startswith(".") and entry.name != SLURM for entry in folder.iterdir()):
            raise UsageError(f"{folder} exists and is no sweep; choose another --name or --root")
        write_sealed_json(path, wanted)
        return
    before = read_sealed_json(path)
    if lines := _differences(before, wanted):
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise UsageError(
            f"{folder} holds a sweep of something else:\n"
            + "\n".join(lines[:_SHOWN] + more)
            + "\nRepeat the command with which it began, or give this one another --name"
        )
    if before["trials"] != wanted["trials"]:
        if (folder / CONFIRMATION).exists():
            raise UsageError(
                f"the sweep in {folder} ended after {before['trials']} trials, and its winner has met the test split.\n"
                "Further trials would make that a second look: start another sweep with --name"
            )
        (folder / FINAL).unlink(missing_ok=True)  # the winner is chosen again
        write_sealed_json(path, wanted)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    old, new = _flat(yaml.safe_load(before["recipe"])), _flat(yaml.safe_load(after["recipe"]))
    lines = [
        f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _FREE
    ]
    spaces = [[each["text"] for each in facts["space"]] for facts in (before, after)]
    lines += [f"  --over {text}: was there before" for text in spaces[0] if text not in spaces[1]]
    lines += [f"  --over {text}: is new" for text in spaces[1] if text not in spaces[0]]
    if before["grid"] != after["grid"]:
        lines.append(f"  --grid: was {before['grid']}, now {after['grid']}")
    if before["data"] != after["data"]:
        lines.append(f"  images: were {before['data'][:12]}, are {after['data'][:12]} (files were added or changed)")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
