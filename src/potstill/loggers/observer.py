"""An observer that also writes to loggers: metrics of every epoch, and in the end those on test."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.errors import PotstillError
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.loggers import LoggerSettings, collect_scalars, flatten
from potstill.loggers.process import CLOSE_SECONDS, INTERRUPTED_CLOSE_SECONDS, LoggerProcess
from potstill.training.callbacks import Observer

LOGGERS_FILE = "tracking.json"  # in the run folder: by which name trackers know the run
_LOGGED_FILES = ("report.html", "results.json", "recipe.yaml")


class LoggingObserver:
    """Passes everything on to another observer, and to trackers what they keep."""

    def __init__(self, observer: Observer, processes: Sequence[LoggerProcess] = ()) -> None:
        self.observer, self.processes = observer, tuple(processes)
        self._stage = ""

    def stage(self, name: str, detail: str) -> None:
        self._stage = name
        self.observer.stage(name, detail)

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        self.observer.epoch_start(epoch, epochs, steps, images)

    def step(self, images: int) -> None:
        self.observer.step(images)

    def epoch_end(self, record: dict[str, Any]) -> None:
        self.observer.epoch_end(record)
        own = collect_scalars({key: value for key, value in record.items() if key != "epoch"})
        self.send({"kind": "epoch", "stage": self._stage, "epoch": record["epoch"], "figures": own})

    def wait(self, what: str, done: int, total: int) -> None:
        self.observer.wait(what, done, total)

    def note(self, message: str) -> None:
        self.observer.note(message)

    def warn(self, message: str) -> None:
        self.observer.warn(message)

    def stage_end(self, name: str, seconds: float) -> None:
        self.observer.stage_end(name, seconds)
        self._warn_problems()

    def results(self, results: Mapping[str, Any]) -> None:
        """Figures on test of every stage and of groups of them, gain and verdict: what results.json says."""
        every = {**results["stages"], **results.get("repeats", {}), **results.get("together", {})}
        test = {name: {"test": entry["test"]} for name, entry in every.items()}
        comparison = results.get("comparison") or {}
        gain = {key: comparison[key] for key in ("top1_gain", "gap_closed") if comparison.get(key) is not None}
        verdict = str(comparison.get("verdict") or "")
        self.send({"kind": "final", "figures": collect_scalars({**test, "comparison": gain}), "verdict": verdict})

    def send(self, message: dict[str, Any]) -> None:
        """To every tracker; returns at once."""
        for sender in self.processes:
            sender.send(message)
        self._warn_problems()

    def close(self, finished: bool) -> None:
        """Wait until the trackers have everything, but not for ever."""
        self.send({"kind": "end", "finished": finished})
        for sender in self.processes:
            if problem := sender.close(CLOSE_SECONDS if finished else INTERRUPTED_CLOSE_SECONDS):
                self.observer.warn(problem)

    def _warn_problems(self) -> None:
        for sender in self.processes:
            if problem := sender.problem:
                self.observer.warn(problem)


@contextlib.contextmanager
def logging_observer(
    trackers: Sequence[LoggerSettings], run: Path, parameters: Mapping[str, Any], observer: Observer
) -> Iterator[LoggingObserver]:
    """Report a run to trackers within the block.

    Args:
        trackers: none: nothing is started.
        run: its folder; what it is known by to the trackers is kept there, so that a resumed run goes on with theirs.
        parameters: the recipe's plain values.
        observer: is told everything as before, and of a tracker that fails, once.
    """
    beside = LoggingObserver(observer, _start_loggers(trackers, run, parameters, observer))
    finished = False
    try:
        yield beside
        finished = True
    finally:
        beside.close(finished)  # a run that was stopped may have little time left


def log_files(run: Path, observer: Observer) -> None:
    """Send a finished run's report, figures and recipe to the trackers that know the run; nothing where there is none.

    Args:
        run: its folder.
        observer: is warned where that fails.
    """
    if not (run / LOGGERS_FILE).is_file():
        return
    try:
        known = read_checksummed_json(run / LOGGERS_FILE)
        trackers = [LoggerSettings.model_validate(each) for each in known["trackers"]]
    except (PotstillError, KeyError, TypeError, ValueError) as error:
        observer.warn(f"the report is not sent to the trackers: {error}")
        return
    paths = [str((run / name).resolve()) for name in _LOGGED_FILES if (run / name).is_file()]
    keeping = [each for each in trackers if each.name != "tensorboard"]  # which has no room for files
    beside = LoggingObserver(observer, _start_processes(keeping, run, known["identity"], {}, observer))
    beside.send({"kind": "files", "paths": paths})
    beside.close(True)


def _start_loggers(
    trackers: Sequence[LoggerSettings], run: Path, parameters: Mapping[str, Any], observer: Observer
) -> list[LoggerProcess]:
    if not trackers and not (run / LOGGERS_FILE).exists():
        return []
    identity = secrets.token_hex(4)
    with contextlib.suppress(PotstillError, KeyError):  # none yet, or damaged: the trackers then see a new run
        identity = str(read_checksummed_json(run / LOGGERS_FILE)["identity"])
    kept = {"identity": identity, "trackers": [each.model_dump(mode="json") for each in trackers]}
    write_checksummed_json(run / LOGGERS_FILE, kept)
    return _start_processes(trackers, run, identity, flatten(dict(parameters)), observer)


def _start_processes(
    trackers: Sequence[LoggerSettings],
    run: Path,
    identity: str,
    parameters: Mapping[str, Any],
    observer: Observer,
) -> list[LoggerProcess]:
    started = []
    for each in trackers:
        first = {
            "settings": each.model_dump(mode="json"),
            "run": str(run.resolve()),
            "identity": identity,
            "parameters": dict(parameters),
        }
        try:
            started.append(LoggerProcess(each.name, first))
        except OSError as error:  # no memory for a further process
            observer.warn(f"tracker {each.name} gets nothing of this run: {error.strerror or error}")
    return started
