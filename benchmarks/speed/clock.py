"""Turns, ratios, and how much of the machine somebody else took meanwhile."""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NOISY = 0.05  # share of the CPU taken by others, above which a result is marked

Turn = Callable[[], object]


@dataclass
class Result:
    """Seconds of each contestant's turns, in the order of rounds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: float = 0.0  # share of all cores that other processes took, 0 to 1

    def median(self, name: str) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """(median, least, most) over rounds of the seconds of ``name`` by those of ``to`` in the same round."""
        found = [ours / theirs for ours, theirs in zip(self.seconds[name], self.seconds[to], strict=True)]
        return statistics.median(found), min(found), max(found)

    @property
    def mark(self) -> str:
        """A word of warning, where the machine was not ours alone."""
        return mark_of(self.others)


def take_turns(contestants: Mapping[str, Turn], rounds: int, *, warm_up: int = 1, wall: bool = True) -> Result:
    """Let each contestant have its turn in each round; another one begins each round.

    Args:
        contestants: name -> one turn.
        rounds: that count.
        warm_up: rounds before that do not.
        wall: time by the clock on the wall; else the CPU time of this process and its children.
    """
    clock = clock_of(wall)
    for _ in range(warm_up):
        for turn in contestants.values():
            turn()
    result = Result({name: [] for name in contestants})
    watch, names = Watch(), list(contestants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = clock()
            contestants[name]()
            result.seconds[name].append(clock() - started)
    result.others = watch.others()
    return result


def clock_of(wall: bool) -> Callable[[], float]:
    """Seconds on the wall, or seconds of CPU of this process and its children."""
    return time.perf_counter if wall else cpu_seconds


class Watch:
    """From its making on, how much of the machine others take."""

    def __init__(self) -> None:
        self._before = _machine(), cpu_seconds(), time.perf_counter()

    def others(self) -> float:
        """Share of all cores, 0 to 1."""
        machine, own, wall = self._before
        busy = _machine() - machine - (cpu_seconds() - own)
        return max(0.0, busy / ((time.perf_counter() - wall) * (os.cpu_count() or 1)))


def mark_of(others: float) -> str:
    """A word of warning, where the machine was not ours alone."""
    return f"  (noisy: others took {others:.0%} of the CPU)" if others > NOISY else ""


def cpu_seconds() -> float:
    """Of this process and all its children, those that still run (as processes that decode do) included."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    running = sum(_seconds_of(child.pid) for child in multiprocessing.active_children())
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime + running


def _seconds_of(process: int | None) -> float:
    try:
        # The name, in brackets, may hold spaces; utime and stime are the 14th and 15th field.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _machine() -> float:
    """CPU seconds that all processes have used, with what a hypervisor gave to others; 0 where nobody says."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first to the left, the others to the right."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
