"""The command `check`, and the flags and messages on skipped files that other commands share."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.code_references import permit_code
from potstill.console import escape_control, silence_native_stderr
from potstill.errors import DataError, UsageError
from potstill.training.callbacks import SilentObserver

if TYPE_CHECKING:
    from potstill.data.settings import DataSettings
    from potstill.data.validation import ValidationReport


SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out files that cannot be read, and list them on stderr.")
]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Follow links to files and folders outside the data folder.")
]

MAX_SHOWN = 20  # files that are listed


def print_skipped(source: str, skipped: Sequence[Sequence[str]], what: str = "left out") -> None:
    """List on stderr the files that are left out, or ``what`` else they are."""
    number = "1 file is" if len(skipped) == 1 else f"{len(skipped):,} files are"
    lines = [f"{source}: {number} {what}", *(f"  {path}: {reason}" for path, reason in skipped[:MAX_SHOWN])]
    if len(skipped) > MAX_SHOWN:
        lines.append(f"  and {len(skipped) - MAX_SHOWN:,} more")
    sys.stderr.write("".join(f"{escape_control(line)}\n" for line in lines))


def check(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Data as for run: a folder, a manifest, the name of a data set, ...")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 3 for warnings too.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all findings, not only the first of each kind.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad files and classes that are too small, and check the rest.")
    ] = False,
    follow_links: FollowLinks = False,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="DATA is a folder of images without labels, at any depth.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a data setting, as for run; may be repeated."),
    ] = None,
) -> None:
    """Check images, labels and splits for errors.

    Exits with code 3 if there are any.
    """
    from potstill.data.validation.validate import validate_data

    flags = {"skip_bad": skip_bad, "follow_links": follow_links}
    changes: dict[str, Any] = {key: True for key, on in flags.items() if on} | ({"labeled": False} if no_labels else {})
    chosen = _data_settings(data, settings or []).model_copy(update=changes)
    with silence_native_stderr(), WaitProgress() as progress:
        report = validate_data(chosen, progress)
    with contextlib.suppress(BrokenPipeError):  # `| head` does not change the exit code
        if as_json:
            sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
        else:
            from potstill.data.validation import format_report

            sys.stdout.write(
                "".join(f"{escape_control(line)}\n" for line in format_report(report, everything=everything))
            )
        sys.stdout.flush()
    _raise_on_findings(report, strict)


def _data_settings(data: str, changes: list[str]) -> "DataSettings":
    from potstill.data.settings import DataSettings

    permit_code([data])
    if not changes:
        return DataSettings(source=data)
    if others := [each for each in changes if not each.startswith("data.")]:
        raise UsageError(f"--set {others[0]}: check takes data settings only, data.KEY=VALUE")
    from potstill.config.recipe import load_recipe

    networks = {"teacher": {"model": "cifar/resnet20"}, "student": {"model": "cifar/resnet8"}}  # not used
    return load_recipe({"name": "check", **networks}, changes, flags={"--data": data}).data


def _raise_on_findings(report: "ValidationReport", strict: bool) -> None:
    from potstill.data.validation import summary_line

    if report.count("error") or (strict and report.count("warning")):
        kinds = ", ".join(f"{number} {kind}" for kind, number in report.kinds().items())
        raise DataError(f"{report.source}: {summary_line(report)} ({kinds})")


class WaitProgress(SilentObserver):
    """Shows progress on stderr after one second: as a bar on a terminal, else as lines."""

    DELAY_SECONDS = 1.0
    LINE_SECONDS = 10.0  # between lines

    def __init__(self) -> None:
        self._next: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "WaitProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def wait(self, what: str, done: int, total: int) -> None:
        """Show the progress of a longer wait."""
        if self._next is None:
            self._next = time.monotonic() + self.DELAY_SECONDS
        if self._bar is not None:
            self._bar.update(self._task, completed=done, refresh=done == total)
        elif time.monotonic() >= self._next and done < total:
            self._show(what, done, total)

    def _show(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            sys.stderr.write(f"{what}: {done:,} of {total:,}\n")
            self._next = time.monotonic() + self.LINE_SECONDS
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done)
