"""Training in several processes: the environment variables that torchrun sets.  No torch here."""

import os

from potstill.errors import UsageError

TIMEOUT_VARIABLE = "POTSTILL_TIMEOUT"  # environment variable: seconds
DEFAULT_TIMEOUT = 600.0


def is_torchrun_launched() -> bool:
    """Return whether torchrun has started this process."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def restart_count() -> int:
    """Return how often torchrun has restarted all processes."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if is_torchrun_launched() and count.isdecimal() else 0


def ranks_and_counts() -> tuple[int, int, int, int]:
    """Return rank, number of processes, and both on this machine; UsageError if they are not what torchrun sets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, count, local_rank, local_count = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"several processes are started by torchrun, which sets {', '.join(names)}: {error} is not as it sets it"
        ) from None
    return rank, count, local_rank, local_count


def heartbeat_timeout() -> float:
    """Return the seconds without progress after which a process counts as stalled."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"{TIMEOUT_VARIABLE} is a number of seconds above 0, got {text!r}")
    return seconds
