"""Silence libraries while they decode: Pillow's warnings about odd metadata, and what C libraries write to stderr.

libtiff alone writes hundreds of lines, straight to the terminal.  Light: the command line imports this at start-up.
"""

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Without a handler of its own, Pillow's log lines about odd files would go to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_lock = threading.Lock()
_depth = 0
_saved_filters = warnings.catch_warnings()


@contextmanager
def silence_pillow() -> Iterator[None]:
    """Suppress warnings of Pillow's modules within the block, in every thread.

    ``warnings.catch_warnings`` saves and restores global state, so that overlapping threads would restore each other's;
    here the first thread saves it and the last one restores it.
    """
    global _depth, _saved_filters
    with _lock:
        if _depth == 0:
            _saved_filters = warnings.catch_warnings()
            _saved_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _saved_filters.__exit__(None, None, None)


_STDERR = 2  # the descriptor


@contextmanager
def silence_native_stderr() -> Iterator[None]:
    """Discard what is written to descriptor 2 within the block; ``sys.stderr`` keeps its destination.

    Does nothing if ``sys.stderr`` is not that descriptor.
    """
    outer = sys.stderr
    if not isinstance(outer, io.TextIOWrapper) or _descriptor(outer) != _STDERR:
        yield
        return
    outer.flush()
    kept, nowhere = os.dup(_STDERR), os.open(os.devnull, os.O_WRONLY)
    inner = os.fdopen(kept, "w", encoding=outer.encoding, errors=outer.errors, buffering=1)
    os.dup2(nowhere, _STDERR)
    sys.stderr = inner
    try:
        yield
    finally:
        sys.stderr = outer
        inner.flush()
        os.dup2(kept, _STDERR)
        inner.close()
        os.close(nowhere)


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
