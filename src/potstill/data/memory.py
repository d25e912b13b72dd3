"""How much memory is free, for the decision to keep decoded pixels."""

import os
from pathlib import Path

import torch

_ASSUMED = 4 * 2**30  # bytes, where the system does not say
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes free on the device; of the CPU's memory, what the container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0  # what an accelerator shares with the CPU cannot be asked for: keep the pixels on the CPU
    return min(_available(), _container_room())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS; half of it is a guess
    except (AttributeError, ValueError, OSError):
        return _ASSUMED


def _container_room() -> int:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text()) - _files_in_memory()
    except (OSError, ValueError):  # no such group, or "max"
        return 2**63
    return max(0, limit - used)


def _files_in_memory() -> int:
    """Bytes that the container is charged for, but which the system takes back: mapped pixels too."""
    rows = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in rows if name in ("inactive_file", "active_file"))
