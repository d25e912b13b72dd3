"""Processes that decode: what happens if one dies, never answers, is slow, fails, or finds no shared memory."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest

from potstill.data import workers as module
from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.workers import DecodeWorkers
from potstill.errors import DataError, StorageError, UsageError, WorkerError
from potstill.input_spec import InputSpec

pytestmark = pytest.mark.own_process


class Odd(ArraySet):
    """Images that do something while they are read, by their index."""

    def __init__(self, **does):
        pixels = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
        super().__init__(pixels, np.zeros(12, np.int64), [f"{i:02d}.png" for i in range(12)])
        self.does = does

    def pixels(self, index):
        for what, which in self.does.items():
            if index == which or which == "all":
                getattr(self, what)()
        return super().pixels(index)

    def sleeps(self):
        time.sleep(1000)

    def kills(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def crashes(self):
        faulthandler.disable()  # pytest's
        os.kill(os.getpid(), signal.SIGSEGV)

    def is_slow(self):
        time.sleep(0.4)

    def is_wrong(self):
        raise DataError("photographs/cat.png: cannot be decoded")

    def is_a_bug(self):
        raise ZeroDivisionError("one by nothing")

    def is_no_pickle(self):
        raise type("Local", (Exception,), {})("of a class that cannot be pickled")

    def takes_all_memory(self):
        raise MemoryError


BATCHES = [list(range(start, start + 4)) for start in (0, 4, 8)]


def read(images):
    workers, found, said = DecodeWorkers(images, 8, "stretch", 1), 0, ""
    try:
        for _ in workers.squares(BATCHES):
            found += 1
    except WorkerError as error:
        said = str(error)
    del workers
    gc.collect()  # the error's frames hold them too
    assert multiprocessing.active_children() == []
    return found, said


def kill_one():
    """Kill one of the processes that decode, and wait until it has ended."""
    child = multiprocessing.active_children()[-1]
    child.kill()
    assert wait([child.sentinel], 60)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_come_in_order_whatever_their_sizes(count):
    workers = DecodeWorkers(Odd(), 8, "stretch", count)
    for batches in ([[3, 1], [0], [11, 10, 9], [5]], [[i] for i in range(12)], [], BATCHES, [list(range(12))]):
        found = [pixels[:, 0, 0, 0].tolist() for pixels in workers.squares(batches)]
        assert found == batches
    workers.close()
    assert multiprocessing.active_children() == []


def test_pixels_stay_as_they_are_while_later_batches_are_decoded():
    workers = DecodeWorkers(Odd(), 8, "stretch", 1)
    kept = list(workers.squares([[i] for i in range(12)]))
    assert [int(each.unique()) for each in kept] == list(range(12))


def test_an_epoch_that_was_given_up_leaves_nothing_to_the_next():
    workers = DecodeWorkers(Odd(is_slow=2), 8, "stretch", 2)
    batches = [[0], [1], [2]]  # the first process is busy with 2 when the second epoch begins
    first = workers.squares(batches)
    next(first)
    assert [each[:, 0, 0, 0].tolist() for each in workers.squares(batches[::-1])] == batches[::-1]
    with pytest.raises(UsageError, match="one epoch at a time"):
        next(first)


def test_a_stalled_process_is_noticed_in_time(monkeypatch):
    monkeypatch.setenv("POTSTILL_TIMEOUT", "2")
    found, said = read(Odd(sleeps=5))
    assert found == 1
    first, second = said.splitlines()
    assert first == (
        "a process that decodes images has not answered for 2 seconds; "
        "the next images were 04.png, 05.png, 06.png and 1 more"
    )
    assert "POTSTILL_TIMEOUT" in second


def test_a_stopped_process_is_noticed_in_time(monkeypatch):
    monkeypatch.setenv("POTSTILL_TIMEOUT", "1")
    workers = DecodeWorkers(Odd(), 8, "stretch", 1)
    batches = workers.squares([[i] for i in range(12)])
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="has not answered for 1 seconds"):
        list(batches)
    assert multiprocessing.active_children() == []


def test_a_process_that_is_slow_but_gets_on_is_waited_for(monkeypatch):
    """A batch of four images takes 1.6 s, the time-out is 1.5 s, each image takes 0.4 s."""
    monkeypatch.setenv("POTSTILL_TIMEOUT", "1.5")
    assert read(Odd(is_slow="all")) == (3, "")


@pytest.mark.parametrize(("does", "name"), [("kills", "SIGKILL"), ("crashes", "SIGSEGV")])
def test_a_dead_process_is_noticed_and_its_images_are_named(does, name):
    found, said = read(Odd(**{does: 9}))
    assert found <= 2  # the batch before may not have been fetched yet
    assert said.startswith("a process that decodes images has died; the next images were ")
    assert f"killed for lack of memory, ended by {name}" in said


def test_a_death_surfaces_where_a_batch_is_fetched_and_nowhere_else(tmp_path):
    """Nothing is raised in other work of the main thread, neither in Python nor in a system call."""
    before = signal.getsignal(signal.SIGCHLD)
    workers = DecodeWorkers(Odd(), 8, "stretch", 2)
    batches = workers.squares([[i] for i in range(12)])
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    kill_one()
    for i in range(50):  # what a save does
        (tmp_path / "part").write_bytes(bytes(1000))
        os.replace(tmp_path / "part", tmp_path / str(i))
    with pytest.raises(WorkerError, match="has died"):
        list(batches)


def test_an_idle_process_that_dies_between_epochs_is_noticed():
    workers = DecodeWorkers(Odd(), 8, "stretch", 2)
    list(workers.squares(BATCHES))
    kill_one()
    with pytest.raises(WorkerError, match="has died"):
        list(workers.squares(BATCHES))
    assert len(list(workers.squares(BATCHES))) == 3  # others are started for who goes on


@pytest.mark.parametrize(
    ("does", "kind", "said"),
    [
        ("is_wrong", DataError, "photographs/cat.png: cannot be decoded"),
        ("is_a_bug", ZeroDivisionError, "one by nothing"),
        ("is_no_pickle", RuntimeError, "Local: of a class that cannot be pickled"),
        ("takes_all_memory", MemoryError, ""),
    ],
)
def test_an_error_arrives_as_what_it_is(does, kind, said):
    with pytest.raises(kind) as error:
        list(DecodeWorkers(Odd(**{does: 6}), 8, "stretch", 2).squares(BATCHES))
    assert str(error.value) == said
    assert does in error.value.__notes__[0]  # the line of the process in which it arose


@pytest.mark.parametrize(("room", "processes"), [(10**9, 4), (3 * 1536, 3), (2 * 1536 - 1, 1), (100, 0)])
def test_as_many_processes_as_shared_memory_suffices_for(monkeypatch, room, processes):
    """By hand: two batches of four images of 8 x 8 x 3 bytes are 1,536 bytes for each process."""
    monkeypatch.setattr(module, "_free", lambda: room)
    warnings = []
    workers = DecodeWorkers(Odd(), 8, "stretch", 4, batch=4, warn=warnings.append)
    assert workers.count == processes
    assert bool(warnings) == (processes < 4)
    if warnings:
        assert warnings[0].startswith(f"shared memory (/dev/shm) has {room:,} bytes free; 4 processes")
        assert "need 6,144 (6.14 kB)" in warnings[0]
        assert ("the main process alone" if processes == 0 else f"{processes} of them") + " will decode" in warnings[0]
    if processes:
        assert [each[:, 0, 0, 0].tolist() for each in workers.squares(BATCHES)] == BATCHES
    else:
        with pytest.raises(StorageError, match=r"has 100 bytes free, and a process that decodes needs 1,536"):
            next(workers.squares(BATCHES))


def test_a_loader_without_shared_memory_decodes_by_itself(monkeypatch):
    spec = InputSpec(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    plain = Loader(Odd(), spec, batch_size=4, cache_fraction=1e-15)
    monkeypatch.setattr(module, "_free", lambda: 10)
    with pytest.warns(UserWarning, match="shared memory .* has 10 bytes free"):
        loader = Loader(Odd(), spec, batch_size=4, cache_fraction=1e-15, workers=2)
    assert loader.processes == 0
    for ours, theirs in zip(loader.epoch(0), plain.epoch(0), strict=True):
        assert ours.images.equal(theirs.images)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("POTSTILL_TIMEOUT", text)
    with pytest.raises(UsageError, match=f"POTSTILL_TIMEOUT is a number of seconds above 0, got {text!r}"):
        DecodeWorkers(Odd(), 8, "stretch", 1)


ORPHANS = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {here!r})
from test_workers import BATCHES, Odd
from potstill.data.workers import DecodeWorkers
workers = DecodeWorkers(Odd(), 8, "stretch", 2)
next(workers.squares(BATCHES))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_no_process_outlives_a_main_process_that_is_killed():
    script = ORPHANS.format(here=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as started:
        pids = started.stdout.readline().split()
        assert len(pids) == 2
        assert started.stdout.read() == ""  # until the last process that holds the pipe has ended
    assert started.returncode == -signal.SIGKILL
