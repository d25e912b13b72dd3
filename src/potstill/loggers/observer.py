"""An observer that also writes to loggers: metrics of every epoch, and at the end those on test."""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from potstill.errors import PotstillError
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.loggers import Logger, LoggerSettings, collect_scalars, create_logger, flatten, load_logger_class
from potstill.loggers.thread import CLOSE_SECONDS, INTERRUPTED_CLOSE_SECONDS, LoggerThread
from potstill.training.callbacks import Observer

LOGGERS_FILE = "tracking.json"  # in the run folder: the name under which trackers know the run
_LOGGED_FILES = ("report.html", "results.json", "recipe.yaml")


class LoggingObserver:
    """Passes everything on to another observer, and metrics to the loggers."""

    def __init__(self, observer: Observer, threads: Sequence[LoggerThread] = ()) -> None:
        self.observer, self.threads = observer, tuple(threads)
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
        scalars = collect_scalars({key: value for key, value in record.items() if key != "epoch"})
        stage, epoch = self._stage, record["epoch"]
        self.send(lambda logger: logger.epoch(stage, epoch, scalars))

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
        """Log the figures on test of every stage and ensemble, gain and verdict, as in results.json."""
        every = {**results["stages"], **results.get("repeats", {}), **results.get("together", {})}
        test = {name: {"test": entry["test"]} for name, entry in every.items()}
        comparison = results.get("comparison") or {}
        gain = {key: comparison[key] for key in ("top1_gain", "gap_closed") if comparison.get(key) is not None}
        verdict = str(comparison.get("verdict") or "")
        scalars = collect_scalars({**test, "comparison": gain})
        self.send(lambda logger: logger.final(scalars, verdict))

    def send(self, call: Callable[[Logger], None]) -> None:
        """Call every logger, each in its thread; returns at once."""
        for thread in self.threads:
            thread.send(call)
        self._warn_problems()

    def close(self, finished: bool) -> None:
        """Wait until the loggers have everything, with a deadline."""
        self.send(lambda logger: logger.close(finished))
        for thread in self.threads:
            if problem := thread.close(CLOSE_SECONDS if finished else INTERRUPTED_CLOSE_SECONDS):
                self.observer.warn(problem)

    def _warn_problems(self) -> None:
        for thread in self.threads:
            if problem := thread.problem:
                self.observer.warn(problem)


@contextlib.contextmanager
def logging_observer(
    trackers: Sequence[LoggerSettings], run: Path, parameters: Mapping[str, Any], observer: Observer
) -> Iterator[LoggingObserver]:
    """Log a run to trackers within the block.

    Args:
        trackers: if empty, nothing is started.
        run: its folder; keeps the name under which trackers know the run, so that a resumed run continues theirs.
        parameters: the recipe's plain values.
        observer: receives everything as before, and one warning for each tracker that fails.
    """
    identity, threads = "", []
    if trackers or (run / LOGGERS_FILE).exists():
        identity = secrets.token_hex(4)
        with contextlib.suppress(PotstillError, KeyError):  # none yet, or damaged: the trackers then see a new run
            identity = str(read_checksummed_json(run / LOGGERS_FILE)["identity"])
        kept = {"identity": identity, "trackers": [each.model_dump(mode="json") for each in trackers]}
        write_checksummed_json(run / LOGGERS_FILE, kept)
        threads = _start_threads(trackers, run, identity, flatten(dict(parameters)), observer)
    logging = LoggingObserver(observer, threads)
    finished = False
    try:
        yield logging
        finished = True
    finally:
        logging.close(finished)


def log_files(run: Path, observer: Observer) -> None:
    """Send a finished run's report, results and recipe to the trackers that know the run, if any.

    Args:
        run: its folder.
        observer: receives a warning if that fails.
    """
    if not (run / LOGGERS_FILE).is_file():
        return
    try:
        known = read_checksummed_json(run / LOGGERS_FILE)
        trackers = [LoggerSettings.model_validate(each) for each in known["trackers"]]
    except (PotstillError, KeyError, TypeError, ValueError) as error:
        observer.warn(f"the report is not sent to the trackers: {error}")
        return
    paths = [(run / name).resolve() for name in _LOGGED_FILES if (run / name).is_file()]
    keeping = [each for each in trackers if each.name != "tensorboard"]  # which cannot keep files
    logging = LoggingObserver(observer, _start_threads(keeping, run, known["identity"], {}, observer))
    logging.send(lambda logger: logger.files(paths))
    logging.close(True)


def _start_threads(
    trackers: Sequence[LoggerSettings],
    run: Path,
    identity: str,
    parameters: dict[str, Any],
    observer: Observer,
) -> list[LoggerThread]:
    """Packages are imported here, before the training, so that no data worker is forked in the middle of an import."""
    started = []
    for each in trackers:
        try:
            load_logger_class(each.name)
            started.append(LoggerThread(each.name, partial(create_logger, each, run.resolve(), identity, parameters)))
        except Exception as error:  # a foreign package may raise anything while it is imported
            observer.warn(f"tracker {each.name} gets nothing of this run: {type(error).__name__}: {error}"[:300])
    return started
