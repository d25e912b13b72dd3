"""Observers of progress, and the signal handler that stops a training.  No torch here.

On SIGINT or SIGTERM the trainer finishes the step, saves its state and ends; a second signal kills the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

from potstill.errors import Stopped


class Observer(Protocol):
    """Receives the progress of a run; subclass it, or pass any object with these methods, as ``observer``."""

    def expect(self, estimate: Callable[[], Mapping[str, float]]) -> None:
        """Before the first stage; ``estimate`` measures for some seconds how many each stage will take, in order."""

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
    """An observer that ignores everything."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    expect = stage = epoch_start = step = epoch_end = wait = note = warn = stage_end = _ignore


class ForwardingObserver:
    """Forwards all calls to another observer; base of observers that do more."""

    def __init__(self, observer: Observer) -> None:
        self.observer, self.current_stage = observer, ""

    def expect(self, estimate: Callable[[], Mapping[str, float]]) -> None:
        self.observer.expect(estimate)

    def stage(self, name: str, detail: str) -> None:
        self.current_stage = name
        self.observer.stage(name, detail)

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        self.observer.epoch_start(epoch, epochs, steps, images)

    def step(self, images: int) -> None:
        self.observer.step(images)

    def epoch_end(self, record: dict[str, Any]) -> None:
        self.observer.epoch_end(record)

    def wait(self, what: str, done: int, total: int) -> None:
        self.observer.wait(what, done, total)

    def note(self, message: str) -> None:
        self.observer.note(message)

    def warn(self, message: str) -> None:
        self.observer.warn(message)

    def stage_end(self, name: str, seconds: float) -> None:
        self.observer.stage_end(name, seconds)


class OnceObserver(ForwardingObserver):
    """Forwards each note and warning once: those of the first of several trainings are those of all."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(observer)
        self._shown = set[str]()

    def note(self, message: str) -> None:
        if message not in self._shown:
            self._shown.add(message)
            super().note(message)

    def warn(self, message: str) -> None:
        if message not in self._shown:
            self._shown.add(message)
            super().warn(message)


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


class SignalHandler:
    """Context manager that turns SIGINT and SIGTERM into ``Stopped``; outside of the main thread it does nothing."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._is_deferred = False
        self._before: dict[int, Any] = {}
        self._hook_before: Callable[[Any], Any] = sys.unraisablehook

    def __enter__(self) -> "SignalHandler":
        with contextlib.suppress(ValueError):  # not the main thread
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle_signal)
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._handle_unraisable
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle_signal:  # otherwise the handler was replaced meanwhile
                signal.signal(number, handler)
        if self._before and sys.unraisablehook == self._handle_unraisable:
            sys.unraisablehook = self._hook_before
        self._before = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, only set ``requested``, so that the caller can save; raise ``Stopped`` at its end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self.check()

    def check(self) -> None:
        """Raise Stopped if a signal was received."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:  # the second signal: do not wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = number
        if not self._is_deferred:
            raise Stopped(number)

    def _handle_unraisable(self, ignored: Any) -> None:
        """Deliver a signal again that came where Python ignores exceptions: in a finalizer or a weakref's callback."""
        if isinstance(ignored.exc_value, Stopped) and self.requested is not None:
            number, self.requested = self.requested, None
            # Not from here: within a hook, exceptions are ignored, too.
            again = threading.Timer(_DELIVERY_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            self._hook_before(ignored)


_DELIVERY_SECONDS = 0.05
