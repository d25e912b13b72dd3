"""A walk through an image folder that goes on after every problem.

``DIR/{train,val,test}/<class>/*``, or ``DIR/<class>/*``.  Every regular file below a class folder, at any depth,
counts as an image and must decode, except hidden ones (a name with a leading dot) and those that systems make (the
lists in ``data.listing``); both are counted.  Files beside the class folders are not read, and counted too.  Links to
files inside the data folder are followed; links out of it, and links to folders, are refused unless they are to be
followed.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from potstill.data.doctor.listing import Listing, broken
from potstill.data.listing import SPLIT_WORDS, Entry, is_system_name, looks_like_image
from potstill.errors import nearest

_SPLITS = ("train", "val", "test")
_SHOWN = 12  # names in a note


def walk_folder(root: Path, *, follow_links: bool = False) -> Listing:
    """All images of ``root/{train,val,test}/<class>/*`` or ``root/<class>/*``, and all problems of names and places."""
    found = Listing(root, "folders", follow_links=follow_links)
    real = os.path.realpath(root)
    folders = _subfolders(found, root)
    splits = _split_folders(found, folders)
    if splits:
        _beside(found, root, [folder for folder in folders if all(folder != place for _, place in splits)])
    places: list[tuple[str | None, Path]] = [*splits] or [(None, root)]
    for split, place in places:
        classes = folders if place == root else _subfolders(found, place)
        _beside(found, place, [])
        if not classes:
            found.find("no-classes", place, "no class folders; put the images of each class into a folder of its name")
        for each in classes:
            _one_class(found, each, split, real)
    _different_classes(found, splits)
    _splits_within_classes(found)
    found.entries.sort(key=lambda entry: entry.name)
    found.notes += _nested(found)
    return found


def walk_images(root: Path, *, follow_links: bool = False) -> Listing:
    """All images below a folder, at any depth and of no class, and all problems of names and places."""
    found = Listing(root, "folders", follow_links=follow_links)
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
    if splits == {"train"} and len(folders) > 1 and not any(_quietly(found, f) for _, f in named):
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
    before = len(found.entries), len(found.findings)
    found.find_name(folder, folder.name)
    found.entries += (Entry(name, folder.name, split) for name in _files(found, folder, real))
    if (len(found.entries), len(found.findings)) == before:  # else the findings say what became of its images
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
        if not found.enter(inside.rstrip("/") or "."):
            continue
        for item in _listed(found, found.root / inside):
            name = inside + item.name
            if _passed_over(found, item, name):
                continue
            found.find_name(name, item.name)
            if item.is_symlink():
                if problem := found.link_problem(item.path, real):
                    found.find(problem[0], name, problem[1])
                elif os.path.isdir(item.path):
                    waiting.append(f"{name}/")
                else:
                    yield name
            elif item.is_dir():
                waiting.append(f"{name}/")
            elif item.is_file():
                yield name
            else:
                found.find("unreadable", name, "not a regular file")


def _passed_over(found: Listing, item: "os.DirEntry[str]", name: str) -> bool:
    """Whether a file or folder does not count; then it is counted, and where images may be meant, named."""
    if is_system_name(item.name, item.path):
        found.passed_over["._*" if item.name.startswith("._") else item.name] += 1
        return True
    if not item.name.startswith("."):
        return False
    if os.path.isdir(item.path):
        images = sum(looks_like_image(file) for _, _, files in os.walk(item.path) for file in files)
        if images:
            reason = f"a hidden folder with {images:,} image{'s' if images > 1 else ''}; rename it to use them"
            found.find("hidden", name, reason)
        else:
            found.passed_over["hidden folders"] += 1
    elif looks_like_image(item.name):
        found.find("hidden", name, "a hidden file; rename it to use it")
    else:
        found.passed_over["hidden files"] += 1
    return True


def _subfolders(found: Listing, folder: Path) -> list[Path]:
    """Folders that do not hide and are no system's, and with ``follow_links`` links to folders."""
    folders = []
    for item in _listed(found, folder):
        path = Path(item.path)
        if _passed_over(found, item, path.relative_to(found.root).as_posix()):
            continue
        if not item.is_symlink():
            folders += [path] if item.is_dir() else []
        elif not os.path.exists(path):
            found.find("link-broken", path, f"{broken(item.path)}, where class folders are; mend it, or remove it")
        elif os.path.isdir(path):
            if problem := found.link_problem(item.path, os.path.realpath(found.root)):
                found.find(problem[0], path, f"{problem[1]}; put the folder itself there")
            else:
                folders.append(path)
    return folders


def _quietly(found: Listing, folder: Path) -> list[Path]:
    """As ``_subfolders``, without findings."""
    return _subfolders(Listing(found.root, "folders", follow_links=found.follow_links), folder)


def _beside(found: Listing, folder: Path, others: list[Path]) -> None:
    """Images, other files and, where there are split folders, other folders beside the folders that are read."""
    files = [
        item.name
        for item in _listed(Listing(found.root, ""), folder)
        if not item.name.startswith(".") and os.path.isfile(item.path) and not is_system_name(item.name, item.path)
    ]
    images = [name for name in files if looks_like_image(name)]
    if images:
        names = [(folder / name).relative_to(found.root).as_posix() for name in images]
        number = f"{len(images):,} image{'s' if len(images) > 1 else ''} beside the class folders"
        reason = f"{number} ({_few(images[:3])}{', ...' if len(images) > 3 else ''}); put them into one"
        found.find("beside-classes", folder, reason, *names)
    for other in others:
        if any(each.path == other.relative_to(found.root).as_posix() for each in found.findings):
            continue  # a misspelt split, or a name problem
        inside = sum(looks_like_image(file) for _, _, names in os.walk(other) for file in names)
        if inside:
            reason = f"a folder with {inside:,} image{'s' if inside > 1 else ''} beside the split folders"
            found.find("beside-classes", other, f"{reason}; its images have no split, and are not used")
    rest = [name for name in files if name not in set(images)]
    if rest:
        where = "" if folder == found.root else f" in {folder.relative_to(found.root).as_posix()}"
        number = "1 other file" if len(rest) == 1 else f"{len(rest):,} other files"
        found.notes.append(f"{number} beside the class folders{where} not read: {_few(rest)}")


def _different_classes(found: Listing, splits: list[tuple[str, Path]]) -> None:
    names: dict[str, set[str]] = {}
    folders: dict[str, Path] = {}
    for split in _SPLITS:
        for each, folder in splits:
            if each == split:
                names.setdefault(split, set()).update(path.name for path in _quietly(found, folder))
                folders.setdefault(split, folder)
    for name in sorted(set().union(*names.values())):
        has = ", ".join(folders[split].name for split in names if name in names[split])
        for split, there in names.items():
            if there and name not in there:
                place = folders[split]
                found.find("missing-class", place / name, f"class {name!r} is missing in {place.name}; it is in {has}")


def _splits_within_classes(found: Listing) -> None:
    """``cat/train`` and ``cat/test`` in place of ``train/cat`` and ``test/cat``: images of test would be trained on."""
    within: dict[str, set[str]] = {}
    for entry in found.entries:
        folders = entry.name.split("/")[1:-1]
        if entry.split is not None or not folders or folders[0].lower() not in SPLIT_WORDS:
            return
        within.setdefault(entry.label, set()).add(SPLIT_WORDS[folders[0].lower()])
    if within and all("train" in splits and len(splits) > 1 for splits in within.values()):
        label = min(within)
        found.find(
            "split-folders", ".",
            f"the splits lie within the classes ({label}/train): put the classes into the splits (train/{label})",
        )  # fmt: skip


def _nested(found: Listing) -> Iterator[str]:
    deep = [entry.name for entry in found.entries if entry.name.count("/") > 1 + (entry.split is not None)]
    if deep:
        lie = "1 image lies" if len(deep) == 1 else f"{len(deep):,} images lie"
        yield f"{lie} in folders within class folders, such as {deep[0]}; they count for the class"


def passed_over_text(passed_over: Counter[str]) -> str:
    """Hidden and system files and folders in one line, by name.

    Example:
        >>> passed_over_text(Counter({"@eaDir": 2, "hidden files": 1}))
        'passed over: 2 x @eaDir, 1 x hidden files'
    """
    names = [f"{count:,} x {name}" for name, count in passed_over.most_common()]
    return f"passed over: {_few(names)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _listed(found: Listing, folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        found.find("unreadable-folder", folder, f"cannot be read ({error.strerror or error})")
        return []
