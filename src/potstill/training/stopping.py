"""SIGINT and SIGTERM: the step is finished, its state is saved, and the process ends; a second one ends it at once."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from potstill.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


class Stopping:
    """Use as a context manager in the main thread, around whatever may be stopped; elsewhere it hears nothing.

    Attributes:
        requested: the signal that has come; None: go on.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        with contextlib.suppress(ValueError):  # not the main thread
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._heard:  # else something else has been decided meanwhile
                signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Within the block a signal is only noted: whoever is inside looks at ``requested`` and saves before it ends.

        Raises:
            Stopped: at the end of the block, where a signal has come.
        """
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        self.check()

    def check(self) -> None:
        """End here where a signal has come.

        Raises:
            Stopped: it has.
        """
        if self.requested is not None:
            raise Stopped(self.requested)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:  # somebody does not want to wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = number
        if not self._patient:
            raise Stopped(number)
