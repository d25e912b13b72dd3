"""What a caller passes to the trainer: an observer of its progress, and a handler of signals.  No torch here.

On SIGINT or SIGTERM the step is finished, its state is saved, and the process ends; a second signal ends it at once.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Protocol

from potstill.errors import Stopped


class Observer(Protocol):
    """Receives the progress of a run; subclass it, or pass any object with these methods, as ``observer``."""

    def stage(self, name: str, detail: str) -> None:
        """A stage (teacher, baseline, distilled) begins."""

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """Epoch ``epoch`` (from 1) of ``epochs`` begins, with the number of its steps and images."""

    def step(self, images: int) -> None:
        """A training step over ``images`` images is finished."""

    def epoch_end(self, record: dict[str, Any]) -> None:
        """An epoch is finished; ``record`` is its line of metrics.jsonl."""

    def wait(self, what: str, done: int, total: int) -> None:
        """Progress of work outside of training: ``done`` of ``total``."""

    def note(self, message: str) -> None:
        """A message for the user."""

    def warn(self, message: str) -> None:
        """A warning: something that probably affects the result."""

    def stage_end(self, name: str, seconds: float) -> None:
        """A stage is finished."""


class SilentObserver:
    """Watches and says nothing."""

    def stage(self, name: str, detail: str) -> None: ...

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None: ...

    def step(self, images: int) -> None: ...

    def epoch_end(self, record: dict[str, Any]) -> None: ...

    def wait(self, what: str, done: int, total: int) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def stage_end(self, name: str, seconds: float) -> None: ...


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


class SignalHandler:
    """Use as a context manager in the main thread, around whatever may be stopped; elsewhere it hears nothing.

    Attributes:
        requested: the signal that has come; None: go on.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        with contextlib.suppress(ValueError):  # not the main thread
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle_signal:  # else something else has been decided meanwhile
                signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal is only noted: whoever is inside looks at ``requested`` and saves before it ends.

        Raises:
            Stopped: at the end of the block, where a signal has come.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self.check()

    def check(self) -> None:
        """End here where a signal has come.

        Raises:
            Stopped: it has.
        """
        if self.requested is not None:
            raise Stopped(self.requested)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:  # somebody does not want to wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = number
        if not self._is_deferred:
            raise Stopped(number)
