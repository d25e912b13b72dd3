"""Pillow's warnings about odd metadata, silenced while images are decoded."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Without a handler of its own, Pillow's log lines about odd files would go to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_lock = threading.Lock()
_inside = 0
_outer = warnings.catch_warnings()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within the block, in every thread, Pillow's modules give no warnings.

    ``warnings.catch_warnings`` alone saves and restores global state, so that threads which overlap restore each
    other's; here the first one in saves, the last one out restores.
    """
    global _inside, _outer
    with _lock:
        if _inside == 0:
            _outer = warnings.catch_warnings()
            _outer.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _outer.__exit__(None, None, None)
