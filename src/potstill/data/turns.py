"""One process at a time: a lock file, which the system frees however its holder ends."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from potstill.data.watcher import Watcher

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKS = fcntl is not None  # whether this system has such locks
_AGAIN = 0.1  # seconds between two looks
_LOOKS = 20  # until a message says what is waited for


@contextmanager
def turn(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock file, which is made with its folder; gives whether another process had it before.

    Args:
        path: of the file.
        waiting: is called every now and then while another process has it; may raise.

    Raises:
        OSError: the file cannot be made, or cannot be locked there.
    """
    waited = False
    while (handle := _locked(path)) is None:
        waited = True
        waiting()
        time.sleep(_AGAIN)
    try:
        yield waited
    finally:
        os.close(handle)


@contextmanager
def one_process(path: Path, what: str, progress: Watcher | None) -> Iterator[None]:
    """Of several processes on a machine (of one run, or of a sweep) one works, and keeps what it has found for the
    others, which wait meanwhile; where nothing can be locked, each works by itself.

    Args:
        path: of the lock file.
        what: that the other process does; for a note, if it takes longer.
        progress: receives the note.
    """
    looks = itertools.count(1)

    def waiting() -> None:
        if next(looks) == _LOOKS and progress is not None:
            progress.note(f"another process {what}; waiting for it")

    with ExitStack() as held:
        if LOCKS:
            with suppress(OSError):  # a cache that is read-only, or on a disk without locks
                held.enter_context(turn(path, waiting))
        yield


@contextmanager
def turn_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock file where nobody else does; gives whether that is so."""
    handle = _locked(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path) -> int | None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # somebody has removed the folder between the two calls


def _same(handle: int, path: Path) -> bool:
    mine = os.fstat(handle)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
