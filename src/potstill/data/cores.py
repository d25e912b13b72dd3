"""How many threads may decode at once."""

import os


def threads() -> int:
    """The cores that this process may use, at most 16.

    Example:
        >>> 1 <= threads() <= 16
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)
