"""An observer that also writes to loggers: metrics of every epoch, and at the end those on test.

Each logger has a thread with a bounded queue, so that training neither waits for it nor ends because of it.  An error
in a logger ends this logger with one warning.  The threads are daemons: one that hangs is abandoned at the deadline of
``close``.
"""

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from potstill.errors import PotstillError
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.loggers import Logger, LoggerSettings, collect_scalars, create_logger, flatten, load_logger_class
from potstill.training.callbacks import ForwardingObserver, Observer

LOGGERS_FILE = "tracking.json"  # in the run folder: the identity of the run at its trackers


CLOSE_SECONDS = 60.0  # at the end of a run, after which an unfinished logger is abandoned
INTERRUPTED_CLOSE_SECONDS = 10.0  # after an interruption, since the process may soon be killed
QUEUE_SIZE = 10_000  # calls, mostly one an epoch


class LoggerThread:
    """One logger, which ``create`` returns, in its own thread."""

    def __init__(self, name: str, create: Callable[[], Logger]) -> None:
        self.name = name
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(QUEUE_SIZE)
        self._error: str | None = None
        self._reported = False
        self._thread = threading.Thread(target=self._run, args=(create,), name=f"logger {name}", daemon=True)
        self._thread.start()

    def send(self, call: Callable[[Logger], None] | None) -> None:
        """Queue a call, or None as the last; returns at once."""
        if self._error is None:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._error = f"{QUEUE_SIZE} calls are waiting"

    @property
    def problem(self) -> str | None:
        """Why this logger has stopped; None if it has not, or if this was reported before."""
        if self._reported or self._error is None:
            return None
        self._reported = True
        return f"tracker {self.name} has stopped logging this run, which continues without it: {self._error}"

    def close(self, seconds: float = CLOSE_SECONDS) -> str | None:
        """Wait for all calls, at most ``seconds``; return a problem that was not reported before."""
        self.send(None)
        end = time.monotonic() + seconds
        while self._thread.is_alive() and self._error is None and time.monotonic() < end:
            self._thread.join(0.05)
        if self._thread.is_alive() and self._error is None:
            self._error = f"it has not finished within {seconds:g} seconds"
        return self.problem

    def _run(self, create: Callable[[], Logger]) -> None:
        try:
            logger = create()
            while self._error is None and (call := self._calls.get()) is not None:
                call(logger)
        except BaseException as error:  # a foreign package may raise anything, even SystemExit
            line = next(iter(str(error).strip().splitlines()), "")
            self._error = self._error or f"{type(error).__name__}: {line}"[:300]


class LoggingObserver(ForwardingObserver):
    """Forwards all calls to another observer, and metrics to the loggers."""

    def __init__(self, observer: Observer, threads: Sequence[LoggerThread] = ()) -> None:
        super().__init__(observer)
        self.threads = tuple(threads)

    def epoch_end(self, record: dict[str, Any]) -> None:
        super().epoch_end(record)
        scalars = collect_scalars({key: value for key, value in record.items() if key != "epoch"})
        stage, epoch = self.current_stage, record["epoch"]
        self.send(lambda logger: logger.epoch(stage, epoch, scalars))

    def stage_end(self, name: str, seconds: float) -> None:
        super().stage_end(name, seconds)
        self._warn_problems()

    def results(self, results: Mapping[str, Any]) -> None:
        """Log the metrics on test of every stage and ensemble, gain and verdict, as in results.json."""
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
        """Wait until the loggers have processed all calls, with a deadline."""
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
    """Log a run to trackers within the block; the run folder stores its identity there, for a resumed run."""
    identity, threads = "", []
    if trackers or (run / LOGGERS_FILE).exists():
        identity = secrets.token_hex(4)
        with contextlib.suppress(PotstillError, KeyError):  # none yet, or damaged: a new run at the trackers
            identity = str(read_checksummed_json(run / LOGGERS_FILE)["identity"])
        write_checksummed_json(run / LOGGERS_FILE, {"identity": identity})
        threads = _start_threads(trackers, run, identity, flatten(dict(parameters)), observer)
    logging = LoggingObserver(observer, threads)
    finished = False
    try:
        yield logging
        finished = True
    finally:
        logging.close(finished)


def _start_threads(
    trackers: Sequence[LoggerSettings],
    run: Path,
    identity: str,
    parameters: dict[str, Any],
    observer: Observer,
) -> list[LoggerThread]:
    started = []
    for each in trackers:
        try:
            load_logger_class(each.name)
            started.append(LoggerThread(each.name, partial(create_logger, each, run.resolve(), identity, parameters)))
        except Exception as error:  # a foreign package may raise anything while it is imported
            observer.warn(f"tracker {each.name} does not log this run: {type(error).__name__}: {error}"[:300])
    return started
