"""What is to be examined: images with labels and, where the source gives them, splits."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from potstill.data.doctor.findings import Finding
from potstill.data.images import ImageSet
from potstill.data.listing import Entry, name_problem

LINK_TO_FOLDER = "a link to a folder"


@dataclass
class Listing:
    """What a source lists, with all that is wrong about the list itself."""

    root: Path  # of the entries' names
    kind: str  # "folders" or "manifest"; of data that comes split, a sentence on the splits
    ready: bool = False  # comes split
    fingerprint: str = ""  # of data that comes split
    entries: list[Entry] = field(default_factory=list)  # sorted by name
    findings: list[Finding] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # hidden and system files and folders, by name
    notes: list[str] = field(default_factory=list)  # sentences on what is not wrong
    images: ImageSet | None = None  # in the order of the entries, where they are no files below the root
    follow_links: bool = False
    _reached: dict[str, str] = field(default_factory=dict)  # folder without links -> where it was read first

    def find(self, kind: str, path: Path | str, reason: str, *others: str) -> None:
        """Note a problem; ``path`` as it is below the root, or beginning with it."""
        below = path.relative_to(self.root).as_posix() if isinstance(path, Path) else path
        self.findings.append(Finding(kind, below, reason, others))

    def find_name(self, path: Path | str, name: str) -> None:
        """Note a name that cannot be written to tables and logs."""
        if problem := name_problem(name):
            self.find("name", path, problem.removeprefix(f"{name!r}: "))

    def enter(self, folder: str) -> bool:
        """Whether to read a folder, given as it is below the root; one that links lead to twice is a problem."""
        if not self.follow_links:
            return True
        real = os.path.realpath(self.root / folder)
        first = self._reached.setdefault(real, folder)
        if first != folder:
            self.find("link-folder", folder, f"the same folder as {first}, by a link: its images would count twice")
        return first == folder

    def link_problem(self, path: str, root: str) -> tuple[str, str] | None:
        """Why a link must not be followed: kind of finding and reason; None where it leads to a file below the root,
        or, with ``follow_links``, to a file or folder anywhere.

        Args:
            path: the link.
            root: the data folder, without links.
        """
        target = os.path.realpath(path)
        if os.path.islink(target):
            return "link-broken", broken(path)
        is_folder = os.path.isdir(target)
        if not below(target, root) and not self.follow_links:
            return "link-out", f"a link {'to a folder ' if is_folder else ''}out of the data folder, to {target}"
        if is_folder:
            if below(os.path.realpath(os.path.dirname(path)), target):
                return "link-folder", "a link to a folder that holds the link: a loop"
            return None if self.follow_links else ("link-folder", LINK_TO_FOLDER)
        if not os.path.exists(target):
            return "link-broken", broken(path)
        return None if os.path.isfile(target) else ("unreadable", "a link to what is no regular file")


def broken(path: str) -> str:
    """What a link is that leads to no file and no folder."""
    no_end = os.path.islink(os.path.realpath(path))
    return "a link that leads round in a circle" if no_end else "a link to nothing"


def below(path: str, root: str) -> bool:
    """Whether a path lies below a folder or is it, both without links."""
    return path == root or path.startswith(root if root.endswith(os.sep) else root + os.sep)
