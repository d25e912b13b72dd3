"""Threads that share work, file locks between processes, and the protocol that reports progress.

``threaded_map`` returns results in order and keeps few pieces of work waiting.  The operating system frees a file
lock however its holder ends.  ``potstill.training.observer.Observer`` is one ``ProgressReporter``.
"""

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar


class ProgressReporter(Protocol):
    """Every call is cheap."""

    def wait(self, what: str, done: int, total: int) -> None:
        """A longer wait: so much of it is over; ``done == total``: all."""

    def note(self, message: str) -> None:
        """Something worth reading."""

    def warn(self, message: str) -> None:
        """Something that makes it slower than it could be."""


_QUEUED_PER_THREAD = 4  # pieces of work per thread that may wait

_thread = threading.local()  # whether the work of this thread is still wanted

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count() -> int:
    """The cores that this process may use, at most 16.

    Example:
        >>> 1 <= thread_count() <= 16
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


def raise_if_cancelled() -> None:
    """Call before what takes long, in work that ``threaded_map`` spreads.

    Raises:
        CancelledError: nobody takes the results any more, as after a signal: a thread that has more of its piece to do
            would keep the process alive.
    """
    stopped: threading.Event | None = getattr(_thread, "stopped", None)
    if stopped is not None and stopped.is_set():
        raise CancelledError


def threaded_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, at_once: int | None = None
) -> Iterator[Result]:
    """Like ``map``, in threads: results in order, a few pieces ahead of whoever takes them.

    So memory does not grow with the number of items, and whoever stops waits for a few of them only.

    Args:
        work: what to do with an item; its errors surface in the turn of the item.
        items: in order.
        at_once: threads; None: ``thread_count()``; 1: none, everything is done by the caller.
    """
    count = thread_count() if at_once is None else at_once
    stopped = threading.Event()

    def do(item: Item) -> Result:
        _thread.stopped = stopped
        return work(item)

    if count == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            waiting.append(pool.submit(do, item))
            if len(waiting) >= count * _QUEUED_PER_THREAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_FILE_LOCKS = fcntl is not None  # whether this system has such locks
_POLL_SECONDS = 0.1  # seconds between two looks
_POLLS_BEFORE_NOTE = 20  # until a message says what is waited for


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock file, which is made with its folder; gives whether another process had it before.

    Args:
        path: of the file.
        waiting: is called every now and then while another process has it; may raise.

    Raises:
        OSError: the file cannot be made, or cannot be locked there.
    """
    waited = False
    while (handle := _try_lock(path)) is None:
        waited = True
        waiting()
        time.sleep(_POLL_SECONDS)
    try:
        yield waited
    finally:
        os.close(handle)


@contextmanager
def interprocess_lock(path: Path, what: str, progress: ProgressReporter | None) -> Iterator[None]:
    """Of several processes on a machine (of one run, or of a sweep) one works, and keeps what it has found for the
    others, which wait meanwhile; where nothing can be locked, each works by itself.

    Args:
        path: of the lock file.
        what: that the other process does; for a note, if it takes longer.
        progress: receives the note.
    """
    looks = itertools.count(1)

    def waiting() -> None:
        if next(looks) == _POLLS_BEFORE_NOTE and progress is not None:
            progress.note(f"another process {what}; waiting for it")

    with ExitStack() as held:
        if HAS_FILE_LOCKS:
            with suppress(OSError):  # a cache that is read-only, or on a disk without locks
                held.enter_context(file_lock(path, waiting))
        yield


@contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file where nobody else does; gives whether that is so."""
    handle = _try_lock(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _try_lock(path: Path) -> int | None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # somebody has removed the folder between the two calls


def _is_same_file(handle: int, path: Path) -> bool:
    mine = os.fstat(handle)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
