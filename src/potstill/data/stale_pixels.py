"""Room on the disk for decoded pixels: what nobody has used for long makes way."""

import contextlib
import shutil
import time
from pathlib import Path

from potstill.data.turns import turn_if_free

_OLD = 30 * 86_400.0  # seconds without use after which pixels are removed when others come
_IDLE = 86_400.0  # after which they are removed where room is short


def make_room(folder: Path, need: int, share: float) -> bool:
    """Whether the folder's pixels may be written, after others have been removed.

    Args:
        folder: where they will be; its neighbours hold other pixels, and were changed when they were last used.
        need: bytes; those that lie in the folder already count as free.
        share: of the free disk that they may take.

    Raises:
        OSError: the disk does not say how much is free.
    """
    now, have = time.time(), _size(folder)
    for used, other in sorted(_neighbours(folder)):
        fits = need - have <= share * shutil.disk_usage(folder).free
        if now - used < (_OLD if fits else _IDLE):
            break
        # Who has mapped these pixels keeps them until he ends; who is filling the file holds its lock.
        with turn_if_free(other / "lock") as free:
            if free:
                shutil.rmtree(other, ignore_errors=True)
    return need - have <= share * shutil.disk_usage(folder).free


def _neighbours(folder: Path) -> list[tuple[float, Path]]:
    """Time of last use, and folder."""
    found = []
    for path in folder.parent.glob("*/manifest.json"):
        if path.parent != folder:
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.parent))
    return found


def _size(folder: Path) -> int:
    """Bytes on the disk; not what a file's length says, since it may have holes."""
    found = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found += getattr(path.stat(), "st_blocks", 0) * 512
    return found
