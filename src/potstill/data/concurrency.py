"""A map over threads, file locks between processes, and the protocol for progress reports.

The operating system releases a file lock when the process that holds it ends.
``potstill.training.callbacks.Observer`` is a ``ProgressReporter``.
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
    """Receives progress and messages; every call is cheap."""

    def wait(self, what: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` are finished, of work that takes long."""

    def note(self, message: str) -> None:
        """Report information."""

    def warn(self, message: str) -> None:
        """Report a problem that does not stop the work."""


_QUEUED_PER_THREAD = 4  # items that are submitted ahead

_thread = threading.local()  # holds the event that cancels this thread's work

Item = TypeVar("Item")
Result = TypeVar("Result")


_CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, and the period
_MAX_THREADS = 16  # beyond that, threads that decode wait for the interpreter's lock


def usable_cores() -> int:
    """Return the number of cores available to this process: its CPU affinity, capped by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA_FILE.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file; "max" in place of a number
        return cores


def thread_count() -> int:
    """Return the number of threads for work that releases the interpreter's lock: the usable cores, at most 16."""
    return min(_MAX_THREADS, usable_cores())


def worker_count(local_processes: int = 1, *, on_gpu: bool = False) -> int:
    """Return how many processes decode for each of the ``local_processes`` of a training on this machine.

    A training on the CPU keeps half of the cores, one on a GPU a single core.
    """
    own = usable_cores() // local_processes
    return max(1, own - 1 if on_gpu else own // 2)


def raise_if_cancelled() -> None:
    """Raise CancelledError if results of ``threaded_map`` are no longer used; call it before long operations."""
    stopped: threading.Event | None = getattr(_thread, "stopped", None)
    if stopped is not None and stopped.is_set():
        raise CancelledError


def threaded_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Iterator[Result]:
    """Like ``map``, in threads; yields results in order, and computes only a few of them ahead.

    So memory does not grow with the number of items, and a caller that stops waits for a few of them only.
    """
    count = thread_count() if threads is None else threads
    stopped = threading.Event()

    def run(item: Item) -> Result:
        _thread.stopped = stopped
        return work(item)

    if count == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) >= count * _QUEUED_PER_THREAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


_POLL_SECONDS = 0.1
_POLLS_BEFORE_NOTE = 20  # until a note states that this process waits


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock file, created if missing, and call ``on_wait`` until then; yield whether another process held it."""
    waited = False
    while True:
        with try_file_lock(path) as held:
            if held:
                yield waited
                return
        waited = True
        on_wait()
        time.sleep(_POLL_SECONDS)


@contextmanager
def interprocess_lock(path: Path, what: str, progress: ProgressReporter | None) -> Iterator[None]:
    """Let one process of this machine run the block at a time (all of them, if the file cannot be locked)."""
    polls = itertools.count(1)

    def on_wait() -> None:
        if next(polls) == _POLLS_BEFORE_NOTE and progress is not None:
            progress.note(f"another process {what}; waiting for it")

    with ExitStack() as stack:
        with suppress(OSError):  # a read-only cache, or a file system without locks
            stack.enter_context(file_lock(path, on_wait))
        yield


@contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """Try to hold a lock file without waiting; yield whether it is held."""
    from filelock import FileLock, Timeout  # it imports asyncio

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    with suppress(Timeout):
        lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()
