"""The Optuna study behind a sweep: a journal file that any number of processes append to."""

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import ArtifactError, UsageError
from potstill.experiments.sweep.space import Space

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
FIRST_TRIALS = 5  # that are drawn at random, and never pruned


def require_optuna() -> None:
    """Fail early where the extra is missing.

    Raises:
        UsageError: says what to install.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError('a sweep needs optuna, not installed here\nInstall: pip install "potstill[sweep]"')


def open_study(folder: Path, *, minimize: bool, seed: int, grid: bool, epochs: int) -> "optuna.Study":
    """The study in ``folder``, made where there is none.

    Args:
        folder: of the sweep.
        minimize: whether a smaller figure is the better one.
        seed: of the draws; a process that joins draws from another one, or all would draw the same.
        grid: all combinations are wanted, so none is pruned.
        epochs: of a trial; its first quarter is never pruned.

    Raises:
        ArtifactError: the journal is damaged.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(logging.ERROR)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS, n_warmup_steps=max(1, epochs // 4) + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that Optuna calls experimental
            storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
            return optuna.create_study(
                storage=storage,
                study_name="sweep",
                load_if_exists=True,
                direction="minimize" if minimize else "maximize",
                pruner=optuna.pruners.NopPruner() if grid else pruner,
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=FIRST_TRIALS, constant_liar=True),
            )
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # what a damaged line comes to
        raise ArtifactError(f"{folder / JOURNAL} is damaged; start another sweep with --name") from error


def suggest(trial: "optuna.Trial", space: Space) -> dict[str, str]:
    """What a trial tries, as YAML texts by key."""
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


def importances(study: "optuna.Study") -> dict[str, float]:
    """Share of each key in the spread of the figure over finished trials (fANOVA); empty where that says nothing."""
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Mapping[str, Any] = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
    except (ValueError, RuntimeError, ImportError):  # one value of everything, or keys that no two trials share
        return {}
    return {key: float(share) for key, share in found.items()}
