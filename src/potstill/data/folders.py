"""Image folders: ``DIR/{train,val,test}/<class>/*``, or ``DIR/<class>/*``.

Every regular file below a class folder, at any depth, counts as an image and must decode, except hidden ones (a name
with a leading dot) and ``Thumbs.db`` and ``desktop.ini``.  Files beside the class folders do not count.  Links to
files inside the data folder are followed; links out of it, and links to folders, are refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from potstill.data.listing import SPLIT_WORDS, Entry, name_problem, refuse
from potstill.data.splits import SPLITS
from potstill.errors import DataError, nearest

_CLUTTER = {"thumbs.db", "desktop.ini"}


def list_folder(root: Path) -> list[Entry]:
    """All images of a folder, sorted by name.

    Raises:
        DataError: no class folders, a class without images, class folders that differ between splits, forbidden links
            or names; all of them in one message.
    """
    folders = _subfolders(root)
    splits = _split_folders(root, folders)
    problems: list[str] = []
    if splits:
        entries = [entry for split, folder in splits.items() for entry in _classes(root, folder, split, problems)]
        problems += _different_classes(root, splits)
    else:
        entries = list(_classes(root, root, None, problems))
    refuse(str(root), sorted(set(problems)))
    return sorted(entries, key=lambda entry: entry.name)


def list_images(root: Path) -> list[str]:
    """Paths of all images below a folder, at any depth and of no class, relative to it and sorted.

    Raises:
        DataError: none, or forbidden links or names; all of them in one message.
    """
    problems: list[str] = []
    names = list(_files(root, root, problems))
    problems += [problem for name in names if (problem := name_problem(name))]
    refuse(str(root), sorted(set(problems)))
    if not names:
        raise DataError(f"{root}: no images")
    return sorted(names)


def _split_folders(root: Path, folders: list[Path]) -> dict[str, Path]:
    """Split -> folder, or nothing where the folders are classes."""
    found: dict[str, Path] = {}
    for folder in folders:
        split = SPLIT_WORDS.get(folder.name.lower())
        if split is None:
            continue
        if split in found:
            raise DataError(f"{root}: {found[split].name} and {folder.name} are both folders for {split}; keep one")
        found[split] = folder
    if not found:
        return {}
    if "train" not in found:
        if len(found) < len(folders):
            return {}  # a class may well be called "test"
        raise DataError(f"{root}: there is {' and '.join(sorted(found))}, but no folder train")
    if set(found) == {"train"} and len(folders) > 1 and not any(_subfolders(found["train"])):
        return {}
    for folder in folders:
        if folder not in found.values() and (near := nearest(folder.name.lower(), SPLIT_WORDS)):
            raise DataError(f"{folder}: unknown folder beside {', '.join(found)}{near} Rename it, or move it away")
    return found


def _classes(root: Path, folder: Path, split: str | None, problems: list[str]) -> Iterator[Entry]:
    classes = _subfolders(folder)
    if not classes:
        problems.append(f"{folder}: no class folders; put the images of each class into a folder of its name")
    for each in classes:
        if problem := name_problem(each.name):
            problems.append(problem)
        names = list(_files(root, each, problems))
        if not names:
            problems.append(f"{each}: no images; add some, or remove the folder")
        for name in names:
            if problem := name_problem(name):
                problems.append(problem)
            yield Entry(name, each.name, split)


def _files(root: Path, folder: Path, problems: list[str]) -> Iterator[str]:
    """Names relative to ``root``.  To ask for every single file would take six times as long."""
    inside = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    for entry in _listed(folder):
        if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
            continue
        if entry.is_symlink():
            target = Path(entry.path).resolve()
            if not target.is_relative_to(root.resolve()):
                problems.append(f"{entry.path}: a link out of the data folder, to {target}")
            elif not target.is_file():
                problems.append(f"{entry.path}: a link to {'a folder' if target.is_dir() else 'nothing'}")
            else:
                yield inside + entry.name
        elif entry.is_dir():
            yield from _files(root, folder / entry.name, problems)
        elif entry.is_file():
            yield inside + entry.name
        else:
            problems.append(f"{entry.path}: not a regular file")


def _different_classes(root: Path, splits: dict[str, Path]) -> list[str]:
    names = {split: {folder.name for folder in _subfolders(splits[split])} for split in SPLITS if split in splits}
    everyone = sorted(set().union(*names.values()))
    return [
        f"class {name!r} is missing in {splits[split].name}; it is in "
        + ", ".join(splits[other].name for other in names if name in names[other])
        for name in everyone
        for split in names
        if name not in names[split] and names[split]
    ]


def _subfolders(folder: Path) -> list[Path]:
    found = [entry for entry in _listed(folder) if entry.is_dir() and not entry.name.startswith(".")]
    linked = [entry for entry in found if entry.is_symlink()]
    if linked:
        raise DataError(f"{linked[0].path}: a link to a folder; put the folder itself there")
    return [folder / entry.name for entry in found]


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from error
