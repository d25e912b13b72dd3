"""What a folder or a manifest lists, before a file is opened: entries of (name, class, split)."""

from collections.abc import Iterable
from dataclasses import dataclass

from potstill.errors import DataError

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Entry:
    """One image file."""

    name: str  # path below the root, forward slashes
    label: str  # class name
    split: str | None = None  # train, val or test, where the source says so


def refuse(source: str, problems: Iterable[str], what: str = "problem") -> None:
    """One error for all problems: the first twenty and a count.

    Raises:
        DataError: there are any.
    """
    found = list(problems)
    if not found:
        return
    lines = [f"  {problem}" for problem in found[:LISTED_PROBLEMS]]
    if len(found) > LISTED_PROBLEMS:
        lines.append(f"  and {len(found) - LISTED_PROBLEMS} more")
    plural = "" if len(found) == 1 else "s"
    raise DataError("\n".join([f"{source}: {len(found)} {what}{plural}", *lines]))


def name_problem(name: str) -> str | None:
    """Why a path or a class name cannot be written to tables and logs, or None."""
    if not name.isprintable():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name!r}: the name is not UTF-8; rename it"
        return f"{name!r}: control characters in the name; rename it"
    return None
