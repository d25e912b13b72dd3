"""How many threads may decode at once, and work spread over them."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

_AHEAD = 4  # pieces of work per thread that may wait

_thread = threading.local()  # whether the work of this thread is still wanted

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """The cores that this process may use, at most 16.

    Example:
        >>> 1 <= threads() <= 16
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


def stop_if_abandoned() -> None:
    """Call before what takes long, in work that ``in_turn`` spreads.

    Raises:
        CancelledError: nobody takes the results any more, as after a signal: a thread that has more of its piece to do
            would keep the process alive.
    """
    stopped: threading.Event | None = getattr(_thread, "stopped", None)
    if stopped is not None and stopped.is_set():
        raise CancelledError


def in_turn(work: Callable[[Item], Result], items: Iterable[Item], *, at_once: int | None = None) -> Iterator[Result]:
    """Like ``map``, in threads: results in order, a few pieces ahead of whoever takes them.

    So memory does not grow with the number of items, and whoever stops waits for a few of them only.

    Args:
        work: what to do with an item; its errors surface in the turn of the item.
        items: in order.
        at_once: threads; None: ``threads()``; 1: none, everything is done by the caller.
    """
    count = threads() if at_once is None else at_once
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
            if len(waiting) >= count * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
