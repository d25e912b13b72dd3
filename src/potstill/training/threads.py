"""The number of CPU threads of one run."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from potstill.processes.group import ALONE, Processes
from potstill.training.calibration import Calibration, calibrate, training_step
from potstill.training.devices import Compute
from potstill.training.observer import Observer
from potstill.training.settings import TrainingSettings

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, and the period


class Threads:
    """Found at the run's first training, kept by all that follow, put back at its end.

    All trainings of a run compute with one number of threads, so that baseline and distilled differ in nothing else.  A
    resumed run takes the number that its first process found: with another, sums would be rounded otherwise.  Use as a
    context manager around the run.

    Args:
        recorded: environment.json of an earlier process of this run.
        keep: receives the facts for environment.json as soon as they are known.
        processes: those of one machine share its cores; all compute with the number that the first one finds.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
        *,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.before, self.keep, self.settled = torch.get_num_threads(), keep, False
        known = Calibration.recorded(recorded or {})
        # More than there can be: the run has come to another machine.
        fits = known is not None and 1 <= known.threads <= max(self.before, usable_cores())
        self.found = known if fits else None

    def settle(
        self,
        student: nn.Module,
        size: int,
        settings: TrainingSettings,
        compute: Compute,
        *,
        workers: int = 0,
        observer: Observer | None = None,
    ) -> None:
        """Set the threads for a training that is about to begin; the run's first one is timed.

        Args:
            student: as it will be trained; a copy of it is timed.
            size: of its images, in pixels.
            settings: an explicit ``threads`` is taken as it is.
            compute: only a CPU is timed.
            workers: processes that decode meanwhile; they need cores too.
            observer: is told what was found.
        """
        if settings.threads != "auto":
            torch.set_num_threads(settings.threads)
            return
        if self.found is None:
            most = max(1, min(self.before, usable_cores() // self.processes.local_count - workers))
            if most > 1 and compute.device.type == "cpu":
                step = training_step(student, size, settings.batch_size, compute)
                self.found = calibrate(step, [most, 1])
                if observer is not None:
                    observer.note(str(self.found))
            else:
                self.found = Calibration(most)
            self.found = self.processes.share(self.found)
        torch.set_num_threads(self.found.threads)
        if not self.settled and self.keep is not None:
            self.keep(self.facts)
        self.settled = True

    @property
    def facts(self) -> dict[str, Any]:
        """For environment.json; nothing before a number has been found."""
        return {} if self.found is None else self.found.record()

    def __enter__(self) -> "Threads":
        if self.found is not None:  # of a run that goes on, and may have only evaluation left
            torch.set_num_threads(self.found.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self.before)


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, within a container's share of CPU time.

    Example:
        >>> usable_cores() >= 1
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file; "max" in place of a number
        return cores
