"""Stand-ins for loggers, and an observer that remembers."""

import threading

import pytest

from potstill.loggers import observer as module
from potstill.training.callbacks import SilentObserver

from ..experiment.conftest import photographs, pictures, recipe

__all__ = ["photographs", "pictures", "recipe"]  # the run of a second


class Warned(SilentObserver):
    """Keeps the warnings."""

    def __init__(self):
        self.warnings, self.stages = [], []

    def stage(self, name, detail):
        self.stages.append(name)

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def told():
    return Warned()


class Keeps:
    """A logger that keeps what it is called with."""

    def __init__(self, settings, run, identity, parameters):
        self.calls.append(("create", settings.name, identity, parameters))

    def epoch(self, stage, epoch, figures):
        self.calls.append(("epoch", stage, epoch, figures))

    def final(self, figures, verdict):
        self.calls.append(("final", figures, verdict))

    def close(self, finished):
        self.calls.append(("close", finished))


class Fails(Keeps):
    """Raises at the first epoch, as some packages do."""

    def epoch(self, stage, epoch, figures):
        raise SystemExit("the server is gone\nbye")


class Hangs(Keeps):
    """Does not return until the test is over."""

    released = threading.Event()

    def epoch(self, stage, epoch, figures):
        self.released.wait()


@pytest.fixture
def stand_in(monkeypatch):
    """``stand_in(Kind)``: every logger is of that kind; returns the list of calls."""
    Hangs.released.clear()

    def use(kind):
        calls = []
        logger = type("Logger", (kind,), {"calls": calls})
        monkeypatch.setattr("potstill.loggers.load_logger_class", lambda name: logger)
        monkeypatch.setattr(module, "load_logger_class", lambda name: logger)
        monkeypatch.setattr(module, "CLOSE_SECONDS", 0.5)
        return calls

    yield use
    Hangs.released.set()
