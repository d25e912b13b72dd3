"""Files that a verb leaves out: the flags, and the lines on stderr."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out files that cannot be read, and name them on stderr.")
]
FollowLinks = Annotated[bool, typer.Option("--follow-links", help="Read links to files and folders elsewhere too.")]

SHOWN = 20  # files that are named


def say_left_out(source: str, skipped: Sequence[Sequence[str]]) -> None:
    """Say on stderr how many files are left out, and which.

    Args:
        source: the data, as the user named it.
        skipped: path and reason of each.
    """
    from potstill.console import plain

    number = "1 file is" if len(skipped) == 1 else f"{len(skipped):,} files are"
    lines = [f"{source}: {number} left out", *(f"  {path}: {reason}" for path, reason in skipped[:SHOWN])]
    if len(skipped) > SHOWN:
        lines.append(f"  and {len(skipped) - SHOWN:,} more")
    sys.stderr.write("".join(f"{plain(line)}\n" for line in lines))
