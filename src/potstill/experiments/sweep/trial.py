"""One trial: a run folder whose student is judged on val, and never sees the test split."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.experiments.recipe import Recipe
from potstill.experiments.run_folder import RunFolder
from potstill.sealed import read_sealed_json
from potstill.training.observer import Observer, Silent

if TYPE_CHECKING:
    import optuna

    from potstill.training.stopping import Stopping


class Pruned(Exception):
    """A trial that is not worth its remaining epochs.  Raised inside training, caught here."""


class Pruning(Silent):
    """Passes everything on, reports the student's val figure to the study, and ends a hopeless trial."""

    def __init__(self, trial: "optuna.Trial", measure: str, student: str, inner: Observer) -> None:
        self._trial, self._measure, self._student, self._inner, self._stage = trial, measure, student, inner, ""

    def stage(self, name: str, detail: str) -> None:
        """A stage begins."""
        self._stage = name
        self._inner.stage(name, detail)

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """An epoch begins."""
        self._last = epoch == epochs
        self._inner.epoch_start(epoch, epochs, steps, images)

    def step(self, images: int) -> None:
        """More images have been trained on."""
        self._inner.step(images)

    def epoch_end(self, record: dict[str, Any]) -> None:
        """An epoch is over; the student's are reported."""
        self._inner.epoch_end(record)
        value = record.get("val", {}).get(self._measure)
        if self._stage != self._student or value is None:
            return
        self._trial.report(float(value), int(record["epoch"]))
        if not self._last and self._trial.should_prune():
            raise Pruned

    def wait(self, what: str, done: int, total: int) -> None:
        """A longer wait."""
        self._inner.wait(what, done, total)

    def note(self, message: str) -> None:
        """Something worth reading."""
        self._inner.note(message)

    def warn(self, message: str) -> None:
        """Something that probably spoils the result."""
        self._inner.warn(message)

    def stage_end(self, name: str, seconds: float) -> None:
        """A stage is over."""
        self._inner.stage_end(name, seconds)


def carry_out(
    recipe: Recipe,
    trials: Path,
    name: str,
    trial: "optuna.Trial",
    *,
    measure: str,
    student: str,
    observer: Observer,
    stopping: "Stopping | None",
) -> float:
    """Train a trial's student, or go on with what a killed process left of it.

    Args:
        recipe: of this trial, its teacher ready-made.
        trials: folder of the trials' run folders.
        name: of its run folder.
        trial: is told each epoch's figure.
        measure: ``training.selection_metric``.
        student: "distilled", or "baseline" where that is searched.
        observer: is told what happens.
        stopping: hears signals.

    Returns:
        The figure on val of its best epoch.

    Raises:
        Pruned: it was not worth its remaining epochs.
        PotstillError: as ``pipeline.run``.
    """
    from potstill.experiments.pipeline import run

    folder = run(
        recipe,
        root=trials,
        name=name,
        resume=RunFolder(trials / name).known,
        stages=("teacher", "distilled") if student == "distilled" else (student,),
        observer=Pruning(trial, measure, student, observer),
        stopping=stopping,
        evaluate=False,
    )
    return best_on_val(folder, student, measure)


def best_on_val(folder: Path, student: str, measure: str) -> float:
    """The val figure of the epoch whose weights the student has."""
    best = read_sealed_json(folder / student / "model.json")["facts"]["training"]["best_epoch"]
    lines = (folder / student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[best - 1])["val"][measure])
