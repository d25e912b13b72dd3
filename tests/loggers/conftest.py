"""Processes that stand in for trackers, and an observer that remembers."""

import json
import sys

import pytest

from potstill.loggers import observer as module
from potstill.loggers.process import LoggerProcess
from potstill.training.callbacks import SilentObserver

from ..experiment.conftest import photographs, pictures, recipe

__all__ = ["photographs", "pictures", "recipe"]  # the run of a second

KEEPS = "import sys; open(sys.argv[1], 'a').writelines(sys.stdin)"
FAILS = "import sys; sys.stdin.readline(); print('ConnectionError: the server is gone', flush=True); sys.exit(1)"
HANGS = "import time; time.sleep(600)"


class Told(SilentObserver):
    """Keeps what it was warned of."""

    def __init__(self):
        self.warnings, self.stages = [], []

    def stage(self, name, detail):
        self.stages.append(name)

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """``stand_in(script)``: every tracker is that script; returns how to read what KEEPS has kept."""
    kept = tmp_path / "kept.jsonl"

    def use(script):
        command = [sys.executable, "-c", script, str(kept)]
        monkeypatch.setattr(module, "LoggerProcess", lambda name, first: LoggerProcess(name, first, command))
        monkeypatch.setattr(module, "CLOSE_SECONDS", 1.0)
        return lambda: [json.loads(line) for line in kept.read_text().splitlines()]

    return use
