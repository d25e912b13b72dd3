"""Turns, ratios, and how much of the machine somebody else took meanwhile."""

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
        return f"  (noisy: others took {self.others:.0%} of the CPU)" if self.others > NOISY else ""


def take_turns(contestants: Mapping[str, Turn], rounds: int, *, warm_up: int = 1, wall: bool = True) -> Result:
    """Let each contestant have its turn in each round, first those before, then those after in turn.

    Args:
        contestants: name -> one turn.
        rounds: that count.
        warm_up: rounds before that do not.
        wall: time by the clock on the wall; else the CPU time of this process and its children.
    """
    clock = time.perf_counter if wall else _cpu_seconds
    for _ in range(warm_up):
        for turn in contestants.values():
            turn()
    result = Result({name: [] for name in contestants})
    before = _machine(), _cpu_seconds(), time.perf_counter()
    names = list(contestants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = clock()
            contestants[name]()
            result.seconds[name].append(clock() - started)
    passed = time.perf_counter() - before[2]
    busy = _machine() - before[0] - (_cpu_seconds() - before[1])
    result.others = max(0.0, busy / (passed * (os.cpu_count() or 1)))
    return result


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


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
