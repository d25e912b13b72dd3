"""What C libraries write straight to the terminal, kept away from it: libtiff alone says hundreds of lines."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2  # the descriptor


@contextmanager
def silenced() -> Iterator[None]:
    """Within the block, what is written to descriptor 2 is lost; ``sys.stderr`` goes on where it went before.

    Nothing happens where ``sys.stderr`` is not that descriptor.
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
