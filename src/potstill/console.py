"""Terminal output: progress on stderr (bars on a terminal, else a line per epoch), results on stdout.

Imported at start-up, so rich is imported at first use.
"""

import io
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from potstill.formatting import format_duration, format_percent

if TYPE_CHECKING:
    from rich.console import Console

    from potstill.experiment.estimate import StageTime


TEXT_WIDTH = 100  # characters of running text
_BAR_WIDTH = 110  # characters of a terminal that shows all columns of the progress bar
_NARROW_COLUMNS = 44  # characters of share, epoch, metric and time left
_LINE_INTERVAL = 5.0  # seconds between two lines of progress without a terminal, at least
_INTERVAL_SHARE = 0.01  # of the time since the start, at least: a day's log has hundreds of such lines, not thousands
_RECENT_EPOCHS = 4  # whose speed predicts the time left
_MIN_PACED = 5.0  # seconds of estimates that tell how much faster or slower the rest will be: start-up takes seconds
_MIN_MEASURED = 2.0  # seconds of a stage after which its own speed replaces the estimate


def escape_control(text: str, keep: str = "") -> str:
    r"""Escape control characters, as a file name must not control the terminal.

    Example:
        >>> print(escape_control("cat" + chr(27) + "[2J.png"))
        cat\x1b[2J.png
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """An Observer that shows progress on the terminal; a context manager."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._interactive = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = _progress_bar(self._console) if self._interactive else None
        self._task: Any = None
        self._stage = ""
        self._epochs = self._epoch = self._images = self._seen = 0
        self._began = 0.0
        self._epoch_starts: list[float] = []
        self._best = ""
        self._waiting: tuple[str, Any] | None = None  # its name, and its bar
        self._waited_until: float | None = None  # the last call of wait() whose work was not over
        self._expected: dict[str, float] = {}  # seconds of the present stage and those after it, by an estimate
        self._passed = [0.0, 0.0]  # seconds of the stages before: by the estimate, and in fact
        self._start = self._last_line = self._stage_began = self._training_began = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, estimate: Callable[[], Mapping[str, float]]) -> None:
        """Print how long the run and each stage will take."""
        self._expected = dict(estimate())
        if self._expected:
            sums = dict[str, float]()  # of all folds
            for name, seconds in self._expected.items():
                role = name.rpartition("/")[2]
                sums[role] = sums.get(role, 0.0) + seconds
            each = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in sums.items())
            self._line(f"expected: about {format_duration(sum(self._expected.values()))} on this machine ({each})")

    def stage(self, name: str, detail: str) -> None:
        """Show the beginning of a stage."""
        if name != self._stage:  # a network that is probed and then trained begins twice
            self._stage_began = time.monotonic()
        self._stage, self._best, self._epoch, self._epoch_starts = name, "", 0, []
        self._line(f"{name}: {detail}")
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=None, epoch="", speed="", val="")

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """Show the beginning of an epoch."""
        self._epoch, self._epochs, self._images, self._seen = epoch, epochs, images, 0
        self._began = time.perf_counter()
        if not self._epoch_starts:  # the first epoch, or that with which a resumed training goes on
            self._training_began = time.monotonic()
        self._epoch_starts.append(time.monotonic())
        if self._bar is not None and self._task is not None:
            done = (epoch - 1) * images
            self._bar.update(self._task, total=epochs * images, completed=done, epoch=f"epoch {epoch}/{epochs}")

    def step(self, images: int) -> None:
        """Advance the bar; without a terminal, print a line now and then."""
        self._seen += images
        self._waited_until = None
        speed = self._seen / max(time.perf_counter() - self._began, 1e-9)
        if self._bar is None or self._task is None:
            if self._seen < self._images and self._is_line_due():
                of = f"{self._seen:,} of {self._images:,} images  {speed:,.0f} images/s"
                self._line(f"{self._stage} epoch {self._epoch}/{self._epochs}  {of}{self._time_left()}")
            return
        in_all = self._time_left().rpartition(",")[2]  # the bar itself shows the time left in this stage
        self._bar.update(self._task, advance=images, speed=f"{speed:,.0f} images/s{in_all and f',{in_all}'}")

    def epoch_end(self, record: dict[str, Any]) -> None:
        """Show the metrics of an epoch, a line of metrics.jsonl."""
        measured = record.get("val", {})
        val = f"val top-1 {format_percent(measured.get('top1'))}"
        if measured.get("count") == 0:  # no image has a class
            val = f"val loss {measured['loss']:.4f}"
        if record.get("best"):
            self._best = f"best epoch {record['epoch']}, {val}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._epoch * self._images, val=val, refresh=True)
            return
        loss = record.get("train", {}).get("loss")
        parts = [
            f"{self._stage} epoch {record['epoch']}/{self._epochs}",
            f"loss {loss:.4f}" if isinstance(loss, float) else "",
            val,
            f"{record['images_per_second']:,.0f} images/s" if record.get("images_per_second") else "",
            format_duration(record["seconds"]) if record.get("seconds") is not None else "",
            "best" if record.get("best") else "",
        ]
        self._seen = self._images
        self._line("  ".join(part for part in parts if part) + self._time_left())

    def wait(self, what: str, done: int, total: int) -> None:
        """Show progress of work outside of training; without a terminal, a line now and then."""
        self._leave_out_of_speed(is_over=done >= total)
        if self._bar is None:
            if done < total and self._is_line_due():
                self._line(f"{what}: {done:,} of {total:,}{self._time_left()}")
            return
        if self._waiting is not None and (done >= total or self._waiting[0] != what):
            self._bar.remove_task(self._waiting[1])
            self._waiting = None
        if done < total:
            if self._waiting is None:
                self._waiting = what, self._bar.add_task(what, total=total, epoch="", speed="", val="")
            self._bar.update(self._waiting[1], completed=done, total=total)

    def _leave_out_of_speed(self, is_over: bool) -> None:
        """Leave the time since the last call out of the speed of the epoch, as decoding happens once."""
        now = time.monotonic()
        if self._waited_until is not None and self._epoch_starts:
            passed = now - self._waited_until
            self._began += passed
            self._training_began += passed
            self._epoch_starts[-1] += passed
        self._waited_until = None if is_over else now

    def _is_line_due(self) -> bool:
        now = time.monotonic()
        return now - self._last_line >= max(_LINE_INTERVAL, _INTERVAL_SHARE * (now - self._start))

    def _time_left(self) -> str:
        """Return the time left in this stage and in the run, by the estimate and by the speed so far."""
        if self._stage not in self._expected:
            return ""
        estimated, now = self._expected[self._stage], time.monotonic()
        done = (max(0, self._epoch - 1) + self._seen / max(1, self._images)) / self._epochs if self._epoch else 0.0
        here, passed = max(0.0, estimated - (now - self._stage_began)), list(self._passed)
        if done >= 1 or (done and (now - self._training_began >= _MIN_MEASURED or not here)):
            here = self._rest(estimated, done, now)
            passed = [passed[0] + estimated, passed[1] + now - self._stage_began + here]
        pace = _pace(passed)
        others = sum(seconds for name, seconds in self._expected.items() if name != self._stage)
        return f"  {format_duration(here)} left, {format_duration(here + pace * others)} in all"

    def _rest(self, estimated: float, done: float, now: float) -> float:
        """Return the seconds left in a training of which ``done`` is over, from the speed of the last epoch.

        Epochs in which the teacher runs take longer than those that read its outputs.  If they do not, the outputs
        were cached before.
        """
        time_of_stage = cast("StageTime", estimated)
        share = getattr(estimated, "share", 0.0)
        if not 0 < share < 1 or not time_of_stage.first:
            return self._epoch_seconds(now, self._epoch) * self._epochs * (1 - done)
        if done > share:
            return self._epoch_seconds(now, self._epoch - round(share * self._epochs)) * self._epochs * (1 - done)
        recent = self._epoch_seconds(now, self._epoch) * self._epochs
        first, later = time_of_stage.first / share, (estimated - time_of_stage.first) / (1 - share)
        pace = _pace(self._passed)
        if recent < pace * math.sqrt(first * later):
            return recent * (1 - done)
        return recent * (share - done + (1 - share) * later / first)

    def _epoch_seconds(self, now: float, begun: int) -> float:
        """Return the mean seconds of the last of ``begun`` epochs, or of the only one at its speed so far."""
        starts = self._epoch_starts[-min(_RECENT_EPOCHS, max(1, begun)) :]
        if self._seen >= self._images:  # the end of an epoch
            return (now - starts[0]) / len(starts)
        if len(starts) > 1:
            return (starts[-1] - starts[0]) / (len(starts) - 1)
        return (now - starts[0]) * self._images / max(1, self._seen)

    def note(self, message: str) -> None:
        """Print information."""
        self._line(message)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._line(f"warning: {message}", style="yellow")

    def stage_end(self, name: str, seconds: float) -> None:
        """Show the end of a stage."""
        self._passed[0] += self._expected.pop(name, 0.0)
        self._passed[1] += seconds
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._line(f"{name}: done in {format_duration(seconds)}" + (f", {self._best}" if self._best else ""))
        self._best = ""  # the next stage may have no epochs, if it was trained before

    def _line(self, text: str, style: str | None = None) -> None:
        self._last_line = time.monotonic()
        # Not wrapped: a log is searched by lines.
        self._console.print(escape_control(text, keep="\n"), style=style, soft_wrap=True)


def _pace(passed: list[float]) -> float:
    """Return the measured seconds of stages divided by the estimated ones; 1 if these are too short to tell."""
    return passed[1] / passed[0] if passed[0] >= _MIN_PACED else 1.0


def _progress_bar(console: "Console") -> Any:
    from rich import progress
    from rich.table import Column

    wide = console.width >= _BAR_WIDTH  # else rich would cut off every column
    name = Column(no_wrap=True, max_width=None if wide else max(10, console.width - _NARROW_COLUMNS))
    fields = ("epoch", "speed", "val") if wide else ("epoch", "val")
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=name),
        progress.BarColumn(bar_width=24) if wide else progress.TaskProgressColumn(),
        *(progress.TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in fields),
        *([progress.TextColumn("ETA", markup=False)] if wide else []),
        progress.TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=300,  # longer than an epoch, to include evaluation in the estimate
    )


def print_report_path(page: Path) -> None:
    """Print the path of the report."""
    print_lines([f"report: {escape_control(str(page))}"])


def print_section(title: str, lines: Iterable[str]) -> None:
    """Print a heading and text."""
    print_lines(["", title, *(f"  {line}" for line in lines)])


def print_next_command(command: list[str]) -> None:
    """Print a suggested next command."""
    print_lines([f"next:   {escape_control(shlex.join(command))}"])


def print_lines(lines: Iterable[str]) -> None:
    """Write the lines to stdout in one piece, so that output of other processes does not interleave."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


_STDERR = 2  # the descriptor


@contextmanager
def silence_native_stderr() -> Iterator[None]:
    """Discard what is written to descriptor 2 within the block; ``sys.stderr`` keeps its destination."""
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
