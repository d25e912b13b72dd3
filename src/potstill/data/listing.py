"""What a folder or a manifest lists, before a file is opened: entries of (name, class, split)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from potstill.errors import DataError

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

# What desktops, NAS systems, version control and notebooks keep beside the user's files, in lower case.
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

# Endings of images, those that are not read among them: a file that ends so is never taken for something else.
IMAGE_ENDINGS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jxr", ".psd", ".psb",
    ".svg", ".ico", ".tga", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".exr", ".hdr", ".dcm", ".nii", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw",
}  # fmt: skip

LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Entry:
    """One image file."""

    name: str  # path below the root, forward slashes; of a file elsewhere its absolute path
    label: str  # class name
    split: str | None = None  # train, val or test, where the source says so


@dataclass(frozen=True)
class Skipped:
    """What ``data.skip_bad`` left out."""

    path: str  # below the data folder
    kind: str  # of ``doctor.findings.KINDS``
    reason: str


def refuse(source: str, problems: Iterable[str], what: str = "problem", hints: Iterable[str] = ()) -> None:
    """One error for all problems: the first twenty and a count, then what can be done about them.

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
    raise DataError("\n".join([f"{source}: {len(found)} {what}{plural}", *lines, *hints]))


def name_problem(name: str) -> str | None:
    """Why a path or a class name cannot be written to tables and logs, or None."""
    if not name.isprintable():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name!r}: the name is not UTF-8; rename it"
        return f"{name!r}: control characters in the name; rename it"
    return None


def is_system_name(name: str, path: str) -> bool:
    """Whether a system made this file or folder beside the user's: by the lists above, AppleDouble's ``._*`` for files
    and ``.Trash-1000`` for folders.
    """
    lower = name.lower()
    file = lower in SYSTEM_FILES or lower.startswith("._")
    folder = lower in SYSTEM_FOLDERS or lower.startswith(".trash-")
    return (file or folder) and (folder if os.path.isdir(path) else file)


def looks_like_image(name: str) -> bool:
    """Whether a file's name ends as names of images do, in whatever case."""
    return "." in name and f".{name.rpartition('.')[2].lower()}" in IMAGE_ENDINGS
