"""Processes that decode: what happens when one dies, or never answers."""

import gc
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from potstill.data.images import ArraySet
from potstill.data.workers import Workers
from potstill.errors import UsageError, WorkerError

pytestmark = pytest.mark.own_process


class Slow(ArraySet):
    """One image that takes for ever, and one that kills whoever reads it."""

    def __init__(self, sleeps=-1, kills=-1):
        super().__init__(np.zeros((12, 8, 8, 3), np.uint8), np.zeros(12, np.int64), [f"{i:02d}.png" for i in range(12)])
        self.sleeps, self.kills = sleeps, kills

    def pixels(self, index):
        if index == self.sleeps:
            time.sleep(1000)
        if index == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pixels(index)


BATCHES = [list(range(start, start + 4)) for start in (0, 4, 8)]


def read(images):
    workers, found, said = Workers(images, 8, "squash", 1), 0, ""
    try:
        for _ in workers.squares(BATCHES):
            found += 1
    except WorkerError as error:
        said = str(error)
    del workers
    gc.collect()  # the error's frames hold them too
    assert multiprocessing.active_children() == []
    return found, said


def test_a_stalled_process_is_noticed_in_time(monkeypatch):
    monkeypatch.setenv("POTSTILL_TIMEOUT", "2")
    found, said = read(Slow(sleeps=5))
    assert found == 1
    first, second = said.splitlines()
    assert first == (
        "a process that decodes images has not answered for 2 seconds; "
        "the next images were 04.png, 05.png, 06.png and 1 more"
    )
    assert "POTSTILL_TIMEOUT" in second


def test_a_dead_process_is_noticed_at_once():
    found, said = read(Slow(kills=9))
    assert found <= 2  # the batch before may have been lost with it
    assert said.startswith("a process that decodes images has died; the next images were ")
    assert "killed for lack of memory" in said


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("POTSTILL_TIMEOUT", text)
    with pytest.raises(UsageError, match=f"POTSTILL_TIMEOUT is a number of seconds above 0, got {text!r}"):
        Workers(Slow(), 8, "squash", 1)
