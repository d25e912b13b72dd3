"""The Optuna study of a sweep (a journal file that any number of processes append to), and the files that are read
without Optuna: sweep.json, trials.json, final.json, confirmation.json.
"""

import importlib.util
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.config.recipe import Recipe, dump_recipe
from potstill.config.yaml import parse_yaml
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.resume import changed_settings, first_lines
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.sweep import Space

if TYPE_CHECKING:
    import optuna


SWEEP_FILE, TRIALS_FILE, FINAL_FILE = "sweep.json", "trials.json", "final.json"
CONFIRMATION_FILE = "confirmation.json"  # once the best trial and the baseline were trained on fresh seeds
CONFIRMATION_FOLDER = "confirmation"  # of the run folders with the fresh seeds
SLURM_FOLDER = "slurm"  # folder of the output of SLURM jobs


MAX_NAME = 64  # characters of a folder's name


def check_name(name: str) -> str:
    """Return the name of a search if it can be that of a folder."""
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{MAX_NAME}}}", name) or set(name) == {"."}:
        raise UsageError(f"--name must be 1 to {MAX_NAME} of the characters A-Z a-z 0-9 . _ -, got {name!r}")
    return name


def describe_sweep(recipe: Recipe, space: Space, fingerprint: str, *, grid: bool, trials: int) -> dict[str, Any]:
    """Return the settings that all processes of a study share, and the number of trials."""
    return {
        "schema": 1,
        "recipe": dump_recipe(recipe),
        "data": fingerprint,
        "space": [dimension.facts() | {"text": str(dimension)} for dimension in space.dimensions],
        "grid": grid,
        "trials": trials,
        "measure": recipe.stage_training("distilled").selection_metric,
    }


def begin_or_join(folder: Path, description: dict[str, Any]) -> None:
    """Create a study or join the existing one; the sweep's lock must be held."""
    path = folder / SWEEP_FILE
    if not path.exists():
        if any(not entry.name.startswith(".") and entry.name != SLURM_FOLDER for entry in folder.iterdir()):
            raise UsageError(f"{folder} exists and is no sweep; choose another --name or --output-dir")
        write_checksummed_json(path, description)
        return
    stored = read_checksummed_json(path)
    check_same_search(folder, stored, description)
    if stored["trials"] != description["trials"]:
        if (folder / CONFIRMATION_FILE).exists():
            raise UsageError(
                f"the sweep in {folder} ended after {stored['trials']} trials whose best was evaluated on test.\n"
                "Further trials would select on the test split: start another sweep with --name"
            )
        (folder / FINAL_FILE).unlink(missing_ok=True)  # the best trial is chosen again
        write_checksummed_json(path, description)


def check_same_search(folder: Path, stored: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise UsageError if two descriptions of a search differ in what changes its result; names the differences."""
    lines = changed_settings(*(parse_yaml(facts["recipe"], "recipe").value for facts in (stored, after)))
    spaces = [[each["text"] for each in facts["space"]] for facts in (stored, after)]
    lines += [f"  --search {text}: was there before" for text in spaces[0] if text not in spaces[1]]
    lines += [f"  --search {text}: is new" for text in spaces[1] if text not in spaces[0]]
    if stored["grid"] != after["grid"]:
        lines.append(f"  --grid: was {stored['grid']}, now {after['grid']}")
    if stored["data"] != after["data"]:
        lines.append(f"  images: were {stored['data'][:12]}, are {after['data'][:12]} (files were added or changed)")
    if lines:
        raise UsageError(
            f"{folder} holds a search with other settings:\n"
            + first_lines(lines)
            + "\nRepeat the command with which it began, or give this one another --name"
        )


JOURNAL_FILE = "journal.log"
STARTUP_TRIALS = 5  # drawn at random, and never pruned


def require_optuna() -> None:
    """Fail early if the extra is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UsageError('a sweep needs optuna, not installed here\nInstall: pip install "potstill[sweep]"')


def open_study(folder: Path, *, minimize: bool, seed: int, grid: bool, epochs: int) -> "optuna.Study":
    """Open the study in ``folder``; create it if it does not exist.

    ``seed`` of the draws: a process that joins draws from another one.  A ``grid`` tries all combinations, and prunes
    none; else the first quarter of a trial's ``epochs`` is never pruned.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(logging.ERROR)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=max(1, epochs // 4) + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental settings of Optuna
            storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))
            return optuna.create_study(
                storage=storage,
                study_name="sweep",
                load_if_exists=True,
                direction="minimize" if minimize else "maximize",
                pruner=optuna.pruners.NopPruner() if grid else pruner,
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True),
            )
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # from a damaged line
        raise ArtifactError(f"{folder / JOURNAL_FILE} is damaged; start another sweep with --name") from error


def suggest_settings(trial: "optuna.Trial", space: Space) -> dict[str, str]:
    """Return the values of a trial as YAML texts by key."""
    chosen: dict[str, str] = {}
    for dimension in space.dimensions:
        if not space.active(dimension, chosen):
            continue
        key = dimension.key
        if dimension.choices:
            chosen[key] = str(trial.suggest_categorical(key, dimension.choices))
        elif dimension.whole:
            chosen[key] = str(trial.suggest_int(key, int(dimension.low), int(dimension.high), log=dimension.log))
        else:
            chosen[key] = repr(trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log))
    return chosen
