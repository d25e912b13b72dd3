"""The verb that examines data: check."""

import contextlib
import json
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.cli.left_out import FollowLinks
from potstill.errors import DataError, UsageError

if TYPE_CHECKING:
    from potstill.data.doctor.report import Report
    from potstill.data.settings import DataSettings


def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder, a manifest, .tar shards, or a name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every finding.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 for warnings too.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every finding, not the first of each kind.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Check what is left without bad files and classes that are too small.")
    ] = False,
    follow_links: FollowLinks = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the data, as for run; may be repeated."),
    ] = None,
) -> None:
    """Look for everything that is wrong with images, labels and splits.

    Exits with 3 where there are errors.
    """
    from potstill.data.doctor.examination import examine
    from potstill.data.native_noise import silenced

    flags = {"skip_bad": skip_bad, "follow_links": follow_links}
    chosen = _settings(data, settings or []).model_copy(update={key: True for key, on in flags.items() if on})
    with silenced(), Waiting() as waiting:
        report = examine(chosen, waiting)
    with contextlib.suppress(BrokenPipeError):  # `| head` does not change the exit code
        if as_json:
            sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
        else:
            from potstill.console import plain
            from potstill.data.doctor.text import lines

            sys.stdout.write("".join(f"{plain(line)}\n" for line in lines(report, everything=everything)))
        sys.stdout.flush()
    _judge(report, strict)


def _settings(data: str, changes: list[str]) -> "DataSettings":
    """The data's part of a recipe."""
    from potstill.data.settings import DataSettings

    if not changes:
        return DataSettings(source=data)
    if others := [each for each in changes if not each.startswith("data.")]:
        raise UsageError(f"--set {others[0]}: check looks at the data alone; give data.KEY=VALUE, as for run")
    from potstill.experiments.recipe import load_recipe

    networks = {"teacher": {"model": "cifar/resnet20"}, "student": {"model": "cifar/resnet8"}}  # of no matter here
    return load_recipe({"name": "check", **networks}, changes, flags={"--data": data}).data


def _judge(report: "Report", strict: bool) -> None:
    from potstill.data.doctor.text import verdict

    if report.count("error") or (strict and report.count("warning")):
        kinds = ", ".join(f"{number} {kind}" for kind, number in report.kinds().items())
        raise DataError(f"{report.source}: {verdict(report)} ({kinds})")


class Waiting:
    """Shows on stderr how far a wait is, once it has taken a second: a bar on a terminal, elsewhere some lines."""

    QUIET = 1.0  # seconds
    EVERY = 10.0  # seconds between lines

    def __init__(self) -> None:
        self._next: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def wait(self, what: str, done: int, total: int) -> None:
        """A longer wait: so much of it is over."""
        if self._next is None:
            self._next = time.monotonic() + self.QUIET
        if self._bar is not None:
            self._bar.update(self._task, completed=done, refresh=done == total)
        elif time.monotonic() >= self._next and done < total:
            self._show(what, done, total)

    def note(self, message: str) -> None:
        """Something worth reading."""

    def warn(self, message: str) -> None:
        """Something that makes it slower than it could be."""

    def _show(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            sys.stderr.write(f"{what}: {done:,} of {total:,}\n")
            self._next = time.monotonic() + self.EVERY
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done)
