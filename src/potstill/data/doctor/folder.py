"""A walk through an image folder that goes on after every problem.

``DIR/{train,val,test}/<class>/*``, or ``DIR/<class>/*``.  Every regular file below a class folder, at any depth,
counts as an image and must decode, except hidden ones (a name with a leading dot) and ``Thumbs.db`` and
``desktop.ini``.  Files beside the class folders do not count.  Links to files inside the data folder are followed;
links out of it, and links to folders, are refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from potstill.data.doctor.listing import Listing, broken, link_problem
from potstill.data.doctor.looks import EXTENSIONS
from potstill.data.listing import SPLIT_WORDS, Entry
from potstill.errors import nearest

_CLUTTER = {"thumbs.db", "desktop.ini"}
_SPLITS = ("train", "val", "test")


def walk_folder(root: Path) -> Listing:
    """All images of ``root/{train,val,test}/<class>/*`` or ``root/<class>/*``, and all problems of names and places."""
    found = Listing(root, "folders")
    real = os.path.realpath(root)
    folders = _subfolders(found, root)
    splits = _split_folders(found, folders)
    places: list[tuple[str | None, Path]] = [*splits] or [(None, root)]
    for split, place in places:
        classes = folders if place == root else _subfolders(found, place)
        _stray(found, place)
        if not classes:
            found.find("no-classes", place, "no class folders; put the images of each class into a folder of its name")
        for each in classes:
            _one_class(found, each, split, real)
    _different_classes(found, splits)
    found.entries.sort(key=lambda entry: entry.name)
    return found


def walk_images(root: Path) -> Listing:
    """All images below a folder, at any depth and of no class, and all problems of names and places."""
    found = Listing(root, "folders")
    files = _files(found, root, os.path.realpath(root))
    found.entries = [Entry(name, "") for name in sorted(files)]
    if not found.entries:
        found.find("empty-class", ".", "no images")
    return found


def _split_folders(found: Listing, folders: list[Path]) -> list[tuple[str, Path]]:
    """(split, folder), or nothing where the folders are classes."""
    named = [(SPLIT_WORDS[f.name.lower()], f) for f in folders if f.name.lower() in SPLIT_WORDS]
    splits = {split for split, _ in named}
    if not named:
        return []
    if "train" not in splits:
        if len(named) < len(folders):
            return []  # a class may well be called "test"
        found.find("split-folders", ".", f"there is {' and '.join(sorted(splits))}, but no folder train")
    if splits == {"train"} and len(folders) > 1 and not any(_quietly(f) for _, f in named):
        return []
    for split in _SPLITS:
        same = [folder.name for each, folder in named if each == split]
        if len(same) > 1:
            found.find("split-folders", ".", f"{' and '.join(same)} are both folders for {split}; keep one")
    words = ", ".join(folder.name for _, folder in named)
    for folder in folders:
        if folder.name.lower() not in SPLIT_WORDS and (near := nearest(folder.name.lower(), SPLIT_WORDS)):
            found.find("split-folders", folder, f"unknown folder beside {words}{near} Rename it, or move it away")
    return named


def _one_class(found: Listing, folder: Path, split: str | None, real: str) -> None:
    found.find_name(folder, folder.name)
    before = len(found.entries)
    found.entries += (Entry(name, folder.name, split) for name in _files(found, folder, real))
    if len(found.entries) == before:
        found.find("empty-class", folder, "no images; add some, or remove the folder")


def _files(found: Listing, folder: Path, real: str) -> Iterator[str]:
    """Names of regular files at any depth, below the root.

    Without recursion, since the depth is up to whoever made the folders; names are put together as text, since a
    ``Path`` for each file would take several times as long.
    """
    inside = folder.relative_to(found.root).as_posix()
    waiting = ["" if inside == "." else f"{inside}/"]
    while waiting:
        inside = waiting.pop()
        for item in _listed(found, found.root / inside):
            if item.name.startswith(".") or item.name.lower() in _CLUTTER:
                found.passed_over += 1
                continue
            name = inside + item.name
            found.find_name(name, item.name)
            if item.is_symlink():
                if problem := link_problem(item.path, real):
                    found.find(problem[0], name, problem[1])
                else:
                    yield name
            elif item.is_dir():
                waiting.append(f"{name}/")
            elif item.is_file():
                yield name
            else:
                found.find("unreadable", name, "not a regular file")


def _subfolders(found: Listing, folder: Path) -> list[Path]:
    """Folders that are no links and not hidden."""
    folders = []
    for item in _listed(found, folder):
        if item.name.startswith("."):
            continue
        path = Path(item.path)
        if not item.is_symlink():
            folders += [path] if item.is_dir() else []
        elif not os.path.exists(path):
            found.find("link-broken", path, f"{broken(item.path)}, where class folders are; mend it, or remove it")
        elif os.path.isdir(path):
            kind, reason = link_problem(item.path, os.path.realpath(found.root)) or ("link-folder", "a link")
            found.find(kind, path, f"{reason}; put the folder itself there")
    return folders


def _quietly(folder: Path) -> list[Path]:
    """As ``_subfolders``, and nobody is told."""
    return _subfolders(Listing(folder, "folders"), folder)


def _stray(found: Listing, folder: Path) -> None:
    """Images beside the class folders; other files may well lie there."""
    names = [
        item.name
        for item in _listed(Listing(found.root, ""), folder)
        if Path(item.name).suffix.lower() in EXTENSIONS and not item.name.startswith(".") and os.path.isfile(item.path)
    ]
    if names:
        others = [(folder / name).relative_to(found.root).as_posix() for name in names]
        reason = f"{len(names)} image{'s' if len(names) > 1 else ''} beside the class folders; put them into one"
        found.find("beside-classes", folder, reason, *others)


def _different_classes(found: Listing, splits: list[tuple[str, Path]]) -> None:
    names: dict[str, set[str]] = {}
    folders: dict[str, Path] = {}
    for split in _SPLITS:
        for each, folder in splits:
            if each == split:
                names.setdefault(split, set()).update(path.name for path in _quietly(folder))
                folders.setdefault(split, folder)
    for name in sorted(set().union(*names.values())):
        has = ", ".join(folders[split].name for split in names if name in names[split])
        for split, there in names.items():
            if there and name not in there:
                place = folders[split]
                found.find("missing-class", place / name, f"class {name!r} is missing in {place.name}; it is in {has}")


def _listed(found: Listing, folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        found.find("unreadable-folder", folder, f"cannot be read ({error.strerror or error})")
        return []
