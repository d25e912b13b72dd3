"""Entries (name, class, split) that a folder or a manifest lists before a file is opened, and kinds of findings.

``FINDING_KINDS`` defines every kind of problem of data: its severity, why it matters, whether a run refuses it and
whether ``data.skip_bad`` leaves it out.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from potstill.data.image_sets import ImageSet
from potstill.errors import DataError

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

# Created by desktops, NAS systems, version control and notebooks, in lower case.
SYSTEM_FOLDERS = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", ".@__thumb", "#recycle", "#snapshot", ".snapshot",
    ".snapshots", ".zfs", "lost+found", ".thumbnails", ".thumbs", "__macosx", ".appledouble", ".appledb",
    ".appledesktop", ".spotlight-v100", ".trashes", ".trash", ".fseventsd", ".temporaryitems",
    ".documentrevisions-v100", "$recycle.bin", ".git", ".svn", ".hg", ".dvc", ".cache", ".ipynb_checkpoints",
    "__pycache__", ".idea", ".vscode", ".venv", "system volume information", "network trash folder",
    "temporary items",
}  # fmt: skip
SYSTEM_FILES = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", ".ds_store", ".localized", ".directory",
    ".nomedia", ".picasa.ini", "picasa.ini", ".bridgesort", ".bridgecache", ".bridgecachet", "zbthumbnail.info",
    ".gitkeep", ".gitignore", ".gitattributes", ".keep", ".dropbox", ".dropbox.attr", ".volumeicon.icns",
    ".apdisk", ".fuse_hidden", "icon\r",
}  # fmt: skip

MAX_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Entry:
    """One image file."""

    name: str  # path below the root, forward slashes; of a file elsewhere its absolute path
    label: str  # class name
    split: str | None = None  # train, val or test; None: not given by the source


@dataclass(frozen=True)
class SkippedFile:
    """A file or class that ``data.skip_bad`` left out."""

    path: str  # below the data folder
    kind: str  # of FINDING_KINDS
    reason: str


def raise_problems(source: str, problems: Iterable[str], what: str = "problem", hints: Iterable[str] = ()) -> None:
    """Raise one error for all problems, if there are any: the first twenty and a count, then the hints."""
    listed = list(problems)
    if not listed:
        return
    lines = [f"  {problem}" for problem in listed[:MAX_LISTED_PROBLEMS]]
    if len(listed) > MAX_LISTED_PROBLEMS:
        lines.append(f"  and {len(listed) - MAX_LISTED_PROBLEMS} more")
    plural = "" if len(listed) == 1 else "s"
    raise DataError("\n".join([f"{source}: {len(listed)} {what}{plural}", *lines, *hints]))


def name_problem(name: str) -> str | None:
    """Return why a path or a class name cannot be written to tables and logs; None if it can."""
    if not name.isprintable():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            if (encoding := sys.getfilesystemencoding()) != "utf-8":  # LC_ALL=C with PYTHONUTF8=0
                return f"{name!r}: this process reads names of files as {encoding}; set PYTHONUTF8=1"
            return f"{name!r}: the name is not UTF-8; rename it"
        return f"{name!r}: control characters in the name; rename it"
    return None


def is_system_name(name: str, path: str) -> bool:
    """Return whether software created this file or folder: one of the lists above, ``._*`` or ``.Trash-1000``."""
    lower = name.lower()
    file = lower in SYSTEM_FILES or lower.startswith("._")
    folder = lower in SYSTEM_FOLDERS or lower.startswith(".trash-")
    return (file or folder) and (folder if os.path.isdir(path) else file)


Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class FindingKind:
    """One kind of finding."""

    severity: Severity
    what: str  # heading, in the plural
    why: str  # the reason for its severity
    refused: bool = False  # by `potstill run`
    skippable: bool = False  # left out with data.skip_bad


def _refused(what: str, why: str) -> FindingKind:
    return FindingKind("error", what, why, refused=True)


def _skippable(what: str, why: str) -> FindingKind:
    return FindingKind("error", what, why, refused=True, skippable=True)


FINDING_KINDS: dict[str, FindingKind] = {
    # files
    "unreadable": _skippable("unreadable files", "no sample may be left out or replaced silently"),
    "empty-file": _skippable("empty files", "they hold no image; often an interrupted copy"),
    "truncated": _skippable("truncated images", "part of the image is missing; copy the files again"),
    "damaged": _skippable("damaged images", "their pixels cannot be decoded"),
    "no-image": _skippable("files that are not images", "every file in a class folder counts as an image"),
    "oversize": _skippable("oversize files", "beyond the limits of file size or pixels that protect memory"),
    # the listing
    "unreadable-folder": _skippable("unreadable folders", "their images would be missing"),
    "no-classes": _refused("places without class folders", "there is nothing to learn"),
    "empty-class": _skippable("empty classes", "a class without images cannot be learned"),
    "one-class": _refused("too few classes", "a classifier needs at least two"),
    "missing-class": _skippable(
        "classes that are not in every split",
        "metrics of such a split leave out a class; `data.keep_splits` makes another split",
    ),
    "too-few": _skippable("classes too small for a split", "each of train, val and test needs an image of each class"),
    "split-folders": _refused("contradictory split folders", "it is not clear which images are for training"),
    "no-train": _refused("data with other splits, and no train", "there is nothing to train on"),
    "link-out": _skippable(
        "paths and links out of the data",
        "the data would change with files elsewhere; data.follow_links: true reads them",
    ),
    "link-folder": _skippable("links to folders", "images would count twice, or a loop would never end"),
    "link-broken": _skippable("broken links", "the image is missing"),
    "name": _skippable("names that cannot be printed", "they would break tables and logs"),
    "manifest": _refused("manifests that cannot be read", "it is not clear which images there are"),
    "manifest-row": _skippable("invalid rows of the manifest", "their images cannot be used"),
    "table": _refused("tables that cannot be used", "it is not clear which images there are"),
    "table-row": _skippable("invalid rows of tables", "their images cannot be used"),
    "listed-twice": _skippable("files that are listed twice", "the image would count twice, perhaps under two labels"),
    # the images
    "two-labels": FindingKind(
        "error", "images under two labels", "at most one label is right, and no model can predict both"
    ),
    "across-splits": FindingKind(
        "error", "images in more than one split", "metrics on images used for training or model selection are too high"
    ),
    "few-across-splits": FindingKind(
        "warning", "images in more than one split", "below 1 % of the split, metrics hardly change"
    ),
    "duplicate": FindingKind("warning", "duplicates", "the image counts twice, which may be intended"),
    "other-format": FindingKind("warning", "suffixes of another format", "other programs may rely on the suffix"),
    "narrow-range": FindingKind(
        "warning", "images that use less than 1/8 of the range", "they are nearly black to the network; set data.range"
    ),
    "low-contrast": FindingKind(
        "warning", "data that use less than 1/8 of the range", "all images have nearly one gray to the network"
    ),
    "beyond-range": FindingKind(
        "warning", "images with values beyond the range", "values beyond become black or white; set data.range"
    ),
    "mixed-range": FindingKind(
        "warning", "images of different depth", "all share one range; convert them to one depth, or set data.range"
    ),
    "blank": FindingKind("warning", "blank images", "all pixels have one colour; most likely a failed export"),
    "tiny": FindingKind("warning", "tiny images", "a side below 8 pixels shows hardly anything"),
    "similar-names": FindingKind(
        "warning", "names that differ in case, blanks, zeros or Unicode form only", "most likely meant to be the same"
    ),
    "beside-classes": FindingKind("warning", "images beside the class folders", "they have no class, and are not used"),
    "hidden": FindingKind("warning", "hidden images and folders of images", "they are not used"),
    "imbalance": FindingKind("warning", "imbalance", "metrics over all images depend little on the small classes"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One problem of the data."""

    kind: str  # of FINDING_KINDS
    path: str  # below the data folder, forward slashes; ".": all of it
    reason: str  # what was found there, and what to do
    others: tuple[str, ...] = ()  # further paths concerned

    @property
    def severity(self) -> Severity:
        """Severity of its kind."""
        return FINDING_KINDS[self.kind].severity

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"severity": self.severity, **vars(self), "others": list(self.others)}


def suggest_fixes(findings: list[Finding], *, skip_bad: bool = False) -> list[str]:
    """Return options that accept refused findings, one a line; the alternative is to repair the data."""
    kinds = {each.kind for each in findings}
    fixes = []
    if "link-out" in kinds or any(
        each.reason.startswith("a link to a folder;") or each.reason == "a link to a folder" for each in findings
    ):
        fixes.append(
            "To read files elsewhere by links and paths: --set data.follow_links=true (of evaluate: --follow-links)"
        )
    lacking = {
        SPLIT_WORDS.get(each.path.split("/")[0].lower(), each.reason.rpartition(" ")[2])
        for each in findings
        if each.kind == "missing-class"
    }
    if lacking == {"val"}:
        fixes.append(
            "To keep all classes, and the test split: --set data.keep_splits=test (val is then split off from both "
            "train and val)"
        )
    elif lacking:
        fixes.append("To keep all classes: --set data.keep_splits=none (all images are then split anew)")
    skippable = {kind for kind in kinds if FINDING_KINDS[kind].skippable}
    if skippable and not skip_bad:
        small = skippable <= {"missing-class", "too-few"}
        what = "all images of these classes" if small else "the bad files and the classes that are too small"
        fixes.append(f"To go on without {what}, and list them: --skip-bad")
    return fixes


def format_refused(findings: list[Finding], root: Path) -> list[str]:
    """Return the findings that `potstill run` refuses as printable sentences, in order, without repetitions."""
    refused = (each for each in findings if FINDING_KINDS[each.kind].refused)
    return list(dict.fromkeys(f"{_printable(str(root / each.path))}: {each.reason}" for each in refused))


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)


LINK_TO_FOLDER = "a link to a folder"


@dataclass
class Listing:
    """The entries of a source, with the findings about the listing itself."""

    root: Path  # of the entries' names
    kind: str  # "folders" or "manifest"; if ready, a sentence on the splits
    ready: bool = False  # a data set with its own splits
    fingerprint: str = ""  # only if ready
    entries: list[Entry] = field(default_factory=list)  # sorted by name
    findings: list[Finding] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # hidden and system files and folders, by name
    notes: list[str] = field(default_factory=list)  # remarks that are no findings
    images: ImageSet | None = None  # in the order of the entries; None: files below the root
    follow_links: bool = False
    regrouped: str = ""  # what ``sources.regroup`` has changed: clauses that begin with a semicolon
    place: Path | None = None  # the folder that messages name in place of the root
    _visited: dict[str, str] = field(default_factory=dict)  # real path of a folder -> path by which it was read

    @property
    def shown_root(self) -> Path:
        """The folder that messages name."""
        return self.root if self.place is None else self.place

    def report(self, kind: str, path: Path | str, reason: str, *others: str) -> None:
        """Add a finding; ``path`` is relative to the root, or a ``Path`` that begins with it."""
        below = path.relative_to(self.root).as_posix() if isinstance(path, Path) else path
        self.findings.append(Finding(kind, below, reason, others))

    def check_name(self, path: Path | str, name: str) -> None:
        """Add a finding if a name cannot be written to tables and logs."""
        if problem := name_problem(name):
            self.report("name", path, problem.removeprefix(f"{name!r}: "))

    def visit(self, folder: str) -> bool:
        """Return whether to read a folder, a path below the root; a second path to the same folder is a finding."""
        if not self.follow_links:
            return True
        real = os.path.realpath(self.root / folder)
        first = self._visited.setdefault(real, folder)
        if first != folder:
            self.report("link-folder", folder, f"the same folder as {first}, by a link: its images would count twice")
        return first == folder

    def link_problem(self, path: str, root: str) -> tuple[str, str] | None:
        """Return kind and reason of the finding if a link must not be followed; None if it may."""
        target = os.path.realpath(path)
        if not os.path.exists(target):  # also outside, where follow_links would not help
            return "link-broken", broken_link_reason(path)
        is_folder = os.path.isdir(target)
        if not is_below(target, root) and not self.follow_links:
            return "link-out", f"a link {'to a folder ' if is_folder else ''}out of the data folder, to {target}"
        if is_folder:
            if is_below(os.path.realpath(os.path.dirname(path)), target):
                return "link-folder", "a link to a folder that holds the link: a loop"
            return None if self.follow_links else ("link-folder", LINK_TO_FOLDER)
        return None if os.path.isfile(target) else ("unreadable", "a link to something other than a regular file")


def broken_link_reason(path: str) -> str:
    """Return what is wrong with a link that leads to no file and no folder."""
    is_circular = os.path.islink(os.path.realpath(path))
    return "a link that leads round in a circle" if is_circular else "a link to nothing"


def is_below(path: str, root: str) -> bool:
    """Return whether a path is a folder or lies below it; both are real paths."""
    return path == root or path.startswith(root if root.endswith(os.sep) else root + os.sep)
