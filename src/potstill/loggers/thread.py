"""A thread that writes to one logger, so that the training neither waits for it nor ends because of it.

The thread takes calls from a bounded queue.  Whatever the logger raises ends this logger with one warning.  It is a
daemon thread: one that hangs in a foreign package is abandoned at the deadline of ``close``.
"""

import queue
import threading
import time
from collections.abc import Callable

from potstill.loggers import Logger

CLOSE_SECONDS = 60.0  # at the end of a run, until a logger that has not finished is abandoned
INTERRUPTED_CLOSE_SECONDS = 10.0  # after an interruption, since the process may soon be killed
QUEUE_SIZE = 10_000  # epochs, mostly


class LoggerThread:
    """A logger in a thread of its own.

    Args:
        name: of the logger, for messages.
        create: returns the logger; called in the thread.

    Raises:
        RuntimeError: the system allows no further thread.
    """

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
                self._error = f"{QUEUE_SIZE} messages are waiting"

    @property
    def problem(self) -> str | None:
        """Why this logger gets nothing more; only the first time."""
        if self._reported or self._error is None:
            return None
        self._reported = True
        return f"tracker {self.name} gets no more of this run, which continues without it: {self._error}"

    def close(self, seconds: float = CLOSE_SECONDS) -> str | None:
        """Wait until every call was made, at most so long; return a problem that was not reported before."""
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
        except BaseException as error:  # a foreign package may raise anything, SystemExit among it
            line = next(iter(str(error).strip().splitlines()), "")
            self._error = self._error or f"{type(error).__name__}: {line}"[:300]
