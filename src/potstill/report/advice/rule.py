"""One piece of advice, and the facts of a run that rules ask for."""

from dataclasses import dataclass

from potstill.amounts import number
from potstill.report.contents import Run, Stage


@dataclass(frozen=True)
class Advice:
    """What was measured, and what to do about it."""

    title: str  # the problem in a few words
    because: str  # the facts, with their numbers
    todo: str  # what to try
    settings: tuple[str, ...] = ()  # as after --set, where a setting does it
    flags: tuple[str, ...] = ()  # of `potstill run`, likewise


def figure(run: Run, stage: str, split: str, key: str) -> float | None:
    """A final figure, or None; "teacher" is what several teachers say together."""
    if stage == "teacher" and "teachers" in run.together:
        return number((run.together["teachers"].get(split) or {}).get(key))
    found = run.stages.get(stage)
    return None if found is None else number(found.metrics.get(split, {}).get(key))


def images(run: Run, split: str) -> int:
    """How many images a split has; 0 where nobody knows."""
    counts = (run.data.get("counts") or {}).get(split)
    return int(sum(number(each) or 0 for each in counts.values())) if isinstance(counts, dict) else 0


def last_epochs(stage: Stage) -> tuple[int, int] | None:
    """(best epoch, epochs trained); None of a network that was not trained here."""
    epochs = number(stage.training.get("epochs"))
    return None if stage.best_epoch is None or not epochs else (stage.best_epoch, int(epochs))


def student(run: Run) -> Stage | None:
    """The distilled student, else the baseline."""
    return run.stages.get("distilled") or run.stages.get("baseline")
