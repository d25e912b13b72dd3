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
    """Every call is cheap and forces no device synchronisation."""

    def stage(self, name: str, detail: str) -> None:
        """A stage (teacher, baseline, distilled) begins."""

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """Epoch ``epoch`` (from 1) of ``epochs`` begins: so many steps over so many images."""

    def step(self, images: int) -> None:
        """So many more images have been trained on."""

    def epoch_end(self, record: dict[str, Any]) -> None:
        """An epoch is over; ``record`` is its line of metrics.jsonl."""

    def wait(self, what: str, done: int, total: int) -> None:
        """A longer wait outside of training: so much of it is over; ``done == total``: all."""

    def note(self, message: str) -> None:
        """Something worth reading."""

    def warn(self, message: str) -> None:
        """Something that probably spoils the result."""

    def stage_end(self, name: str, seconds: float) -> None:
        """A stage is over."""


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
