"""Where things are kept that can be made again: decoded pixels, teacher outputs.  No torch here."""

import os
from pathlib import Path

VARIABLE = "POTSTILL_CACHE"


def cache_folder(*parts: str) -> Path:
    """A folder within the cache; it need not exist.

    The cache is ``$POTSTILL_CACHE``, else ``$XDG_CACHE_HOME/potstill``, else ``~/.cache/potstill``.

    Example:
        >>> cache_folder("teachers").name
        'teachers'
    """
    if own := os.environ.get(VARIABLE):
        root = Path(own).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "potstill"
    return root.joinpath(*parts)
