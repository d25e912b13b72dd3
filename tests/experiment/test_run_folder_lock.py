"""Two writers never meet, whatever the file system can do; and nobody who was killed keeps the next one out."""

import errno
import os
import signal
import sys
from contextlib import contextmanager

import pytest

from potstill.errors import StorageError
from potstill.experiment import run_folder
from potstill.experiment.run_folder import RunFolder, RunLock

pytestmark = pytest.mark.own_process


@contextmanager
def held_elsewhere(folder):
    """Another process holds the lock, and is killed in the end."""
    reading, held = os.pipe()
    child = os.fork()
    if not child:
        try:
            lock = RunLock(folder)
            lock.acquire()
            os.write(held, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(held)
    try:
        assert os.read(reading, 1) == b"+"
        yield child
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(params=["flock", errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def folder(request, tmp_path, monkeypatch):
    """A folder on a file system with locks, and on such as have none."""
    fcntl = pytest.importorskip("fcntl")
    if request.param != "flock":

        def no_locks(*_):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", no_locks)
    return tmp_path


def test_one_at_a_time_and_a_killed_one_keeps_nobody_out(folder):
    for _ in range(2):
        with held_elsewhere(folder), pytest.raises(StorageError, match="is being written by another process; wait"):
            RunLock(folder).acquire()
        lock = RunLock(folder)
        lock.acquire()
        with pytest.raises(StorageError, match="is being written"):
            RunLock(folder).acquire()
        lock.release()
        lock.release()
    assert not (folder / run_folder.LOCK_HOLDER_FILE).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_another_machine_nobody_can_know(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    holder = tmp_path / run_folder.LOCK_HOLDER_FILE
    for content, who in (("123\nnode7\n55\n", "process 123 on node7"), ("", "an unknown process")):
        holder.write_text(content)
        with pytest.raises(
            StorageError, match=rf"has no locks; \S+\.lock-holder was written by {who}.*delete the file"
        ):
            RunLock(tmp_path).acquire()
    holder.unlink()
    RunLock(tmp_path).acquire()


def test_a_run_folder_without_locks_is_begun_and_left_like_any_other(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder.create(tmp_path, "a"):
        assert (tmp_path / "a" / run_folder.LOCK_HOLDER_FILE).exists()
    assert not (tmp_path / "a").exists()
    with held_elsewhere_named(tmp_path / "a"), pytest.raises(StorageError, match="wait for it, or use --name"):
        RunFolder.create(tmp_path, "a")


@contextmanager
def held_elsewhere_named(folder):
    folder.mkdir()
    with held_elsewhere(folder) as child:
        yield child
