"""List the images of a folder or a manifest; the listing continues after every problem and collects them all.

Folder: ``DIR/{train,val,test}/<class>/*``, or ``DIR/<class>/*``.  Every regular file below a class folder, at any
depth, counts as an image and must decode, except hidden ones (a leading dot) and those that systems make (the lists
in ``data.entries``); both are counted.  Files beside the class folders are not read, and counted too.  Links to
files inside the data folder are followed; links out of it, and links to folders, are refused unless ``follow_links``.

Manifest: a CSV file with the header ``path,label`` or ``path,label,split``, or JSON lines with these keys; the columns
may have other usual names, and further columns are not used.  Paths are relative to the manifest's folder, or absolute.
"""

import csv
import difflib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from potstill.data.entries import (
    SPLIT_WORDS,
    Entry,
    Listing,
    broken_link_reason,
    has_image_suffix,
    is_below,
    is_system_name,
)
from potstill.errors import did_you_mean
from potstill.formatting import format_names

_SPLITS = ("train", "val", "test")
_MAX_NAMES = 12  # names in a note


def walk_folder(root: Path, *, follow_links: bool = False) -> Listing:
    """All images of ``root/{train,val,test}/<class>/*`` or ``root/<class>/*``, and all problems of names and places."""
    found = Listing(root, "folders", follow_links=follow_links)
    real = os.path.realpath(root)
    folders = _subfolders(found, root)
    splits = _split_folders(found, folders)
    if splits:
        _note_files_beside(found, root, [folder for folder in folders if all(folder != place for _, place in splits)])
    places: list[tuple[str | None, Path]] = [*splits] or [(None, root)]
    for split, place in places:
        classes = folders if place == root else _subfolders(found, place)
        _note_files_beside(found, place, [])
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
    if splits == {"train"} and len(folders) > 1 and not any(_subfolders_silently(found, f) for _, f in named):
        return []
    for split in _SPLITS:
        same = [folder.name for each, folder in named if each == split]
        if len(same) > 1:
            found.find("split-folders", ".", f"{' and '.join(same)} are both folders for {split}; keep one")
    words = ", ".join(folder.name for _, folder in named)
    for folder in folders:
        if folder.name.lower() not in SPLIT_WORDS and (near := did_you_mean(folder.name.lower(), SPLIT_WORDS)):
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
        for item in _scan_folder(found, found.root / inside):
            name = inside + item.name
            if _is_ignored(found, item, name):
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


def _is_ignored(found: Listing, item: "os.DirEntry[str]", name: str) -> bool:
    """Whether a file or folder does not count; then it is counted, and where images may be meant, named."""
    if is_system_name(item.name, item.path):
        found.passed_over["._*" if item.name.startswith("._") else item.name] += 1
        return True
    if not item.name.startswith("."):
        return False
    if os.path.isdir(item.path):
        images = sum(has_image_suffix(file) for _, _, files in os.walk(item.path) for file in files)
        if images:
            reason = f"a hidden folder with {images:,} image{'s' if images > 1 else ''}; rename it to use them"
            found.find("hidden", name, reason)
        else:
            found.passed_over["hidden folders"] += 1
    elif has_image_suffix(item.name):
        found.find("hidden", name, "a hidden file; rename it to use it")
    else:
        found.passed_over["hidden files"] += 1
    return True


def _subfolders(found: Listing, folder: Path) -> list[Path]:
    """Folders that do not hide and are no system's, and with ``follow_links`` links to folders."""
    folders = []
    for item in _scan_folder(found, folder):
        path = Path(item.path)
        if _is_ignored(found, item, path.relative_to(found.root).as_posix()):
            continue
        if not item.is_symlink():
            folders += [path] if item.is_dir() else []
        elif not os.path.exists(path):
            found.find(
                "link-broken", path, f"{broken_link_reason(item.path)}, where class folders are; mend it, or remove it"
            )
        elif os.path.isdir(path):
            if problem := found.link_problem(item.path, os.path.realpath(found.root)):
                found.find(problem[0], path, f"{problem[1]}; put the folder itself there")
            else:
                folders.append(path)
    return folders


def _subfolders_silently(found: Listing, folder: Path) -> list[Path]:
    """As ``_subfolders``, without findings."""
    return _subfolders(Listing(found.root, "folders", follow_links=found.follow_links), folder)


def _note_files_beside(found: Listing, folder: Path, others: list[Path]) -> None:
    """Images, other files and, where there are split folders, other folders beside the folders that are read."""
    files = [
        item.name
        for item in _scan_folder(Listing(found.root, ""), folder)
        if not item.name.startswith(".") and os.path.isfile(item.path) and not is_system_name(item.name, item.path)
    ]
    images = [name for name in files if has_image_suffix(name)]
    if images:
        names = [(folder / name).relative_to(found.root).as_posix() for name in images]
        number = f"{len(images):,} image{'s' if len(images) > 1 else ''} beside the class folders"
        reason = f"{number} ({format_names(images[:3])}{', ...' if len(images) > 3 else ''}); put them into one"
        found.find("beside-classes", folder, reason, *names)
    for other in others:
        if any(each.path == other.relative_to(found.root).as_posix() for each in found.findings):
            continue  # a misspelt split, or a name problem
        inside = sum(has_image_suffix(file) for _, _, names in os.walk(other) for file in names)
        if inside:
            reason = f"a folder with {inside:,} image{'s' if inside > 1 else ''} beside the split folders"
            found.find("beside-classes", other, f"{reason}; its images have no split, and are not used")
    rest = [name for name in files if name not in set(images)]
    if rest:
        where = "" if folder == found.root else f" in {folder.relative_to(found.root).as_posix()}"
        number = "1 other file" if len(rest) == 1 else f"{len(rest):,} other files"
        found.notes.append(f"{number} beside the class folders{where} not read: {format_names(rest, _MAX_NAMES)}")


def _different_classes(found: Listing, splits: list[tuple[str, Path]]) -> None:
    names: dict[str, set[str]] = {}
    folders: dict[str, Path] = {}
    for split in _SPLITS:
        for each, folder in splits:
            if each == split:
                names.setdefault(split, set()).update(path.name for path in _subfolders_silently(found, folder))
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


def ignored_files_note(passed_over: Counter[str]) -> str:
    """Hidden and system files and folders in one line, by name.

    Example:
        >>> ignored_files_note(Counter({"@eaDir": 2, "hidden files": 1}))
        'passed over: 2 x @eaDir, 1 x hidden files'
    """
    names = [f"{count:,} x {name}" for name, count in passed_over.most_common()]
    return f"passed over: {format_names(names, _MAX_NAMES)}"


def _scan_folder(found: Listing, folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        found.find("unreadable-folder", folder, f"cannot be read ({error.strerror or error})")
        return []


MANIFEST_SUFFIXES = (".csv", ".jsonl")
MAX_MANIFEST_BYTES = 256 * 2**20  # of a manifest: some millions of rows
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("label", "class", "target", "class_name", "category"),
    "split": ("split", "subset", "partition"),
}  # the first of each wins; of the others one at most
_DELIMITERS = ",;\t"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_MAX_COLUMNS = 5  # names in a note

Row = tuple[int, dict[str, Any]]  # number of its line, and path, label and split as far as it has them


def read_manifest(path: Path, *, follow_links: bool = False) -> Listing:
    """All rows that can be used, and all problems of the others; of a file that is listed twice, the first row."""
    found = Listing(path.parent, "manifest", follow_links=follow_links)
    text = _text(found, path)
    rows = _csv_rows(found, path, text) if path.suffix.lower() == ".csv" else _json_rows(found, path, text)
    real = os.path.realpath(path.parent)
    entries = [entry for line, row in rows if (entry := _entry(found, path, line, row, real)) is not None]
    found.entries = sorted(_drop_repeated(found, path, entries), key=lambda entry: entry.name)
    _check_splits(found, path)
    if not found.entries and not found.findings:
        found.find("no-classes", path, "lists no images")
    return found


def _text(found: Listing, path: Path) -> str:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            found.find("manifest", path, f"more than {MAX_MANIFEST_BYTES // 2**20} MiB; is it a list of images?")
            return ""
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        found.find("manifest", path, f"cannot be read ({error.strerror or error})")
    except UnicodeDecodeError as error:
        found.find("manifest", path, f"a manifest is UTF-8 text ({error.reason} at byte {error.start})")
    return ""


def _csv_rows(found: Listing, path: Path, text: str) -> Iterator[Row]:
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=lambda each: (first.count(each), each == ","))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = next(reader, [])
        columns, problem = _columns(header)
        if problem:
            if not found.findings:  # else there is no text
                found.find("manifest", path, f"the header must be path,label or path,label,split: {problem}")
            return
        _note_unused(found, [name for name in header if name not in columns.values() and name.strip()])
        places = {role: header.index(name) for role, name in columns.items()}
        for row in reader:
            if row and len(row) != len(header):
                reason = f"line {reader.line_num}: {len(header)} columns expected, got {len(row)}"
                found.find("manifest-row", path, reason)
            elif row:
                yield reader.line_num, {role: row[at] for role, at in places.items()}
    except csv.Error as error:
        found.find("manifest", path, f"line {reader.line_num}: {error}; what follows was not read")


def _json_rows(found: Listing, path: Path, text: str) -> Iterator[Row]:
    unused: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
            found.find("manifest-row", path, f"line {number}: no JSON that can be read ({words})")
            continue
        if not isinstance(row, dict):
            found.find("manifest-row", path, f"line {number}: the keys are path, label and split; got no object")
            continue
        columns, problem = _columns(list(row))
        if problem:
            found.find("manifest-row", path, f"line {number}: the keys are path, label and split: {problem}")
            continue
        unused |= dict.fromkeys(name for name in row if name not in columns.values())
        yield number, {role: row[name] for role, name in columns.items()}
    _note_unused(found, list(unused))


def _columns(header: Sequence[str]) -> tuple[dict[str, str], str]:
    """Which column is path, label and split, and what is wrong with the header; unused ones may be there."""
    known: dict[str, str] = {}
    for role, names in COLUMNS.items():
        fitting = [name for name in header if name.strip().lower() in names]
        own = [name for name in fitting if name.strip().lower() == role] or fitting
        if len(own) > 1:
            return {}, f"{' and '.join(map(repr, own))} may both be the {role}; rename or remove one"
        if own:
            known[role] = own[0]
    rest = [name for name in header if name not in known.values()]
    lacking = [role for role in ("path", "label") if role not in known]
    if lacking:
        near = next((each for name in rest if (each := did_you_mean(name.strip().lower(), lacking))), "")
        return {}, f"there is no column {' and '.join(lacking)}, got {','.join(header)[:200] or 'nothing'}{near}"
    typos = [name for name in rest if difflib.get_close_matches(name.lower(), ["split"], cutoff=0.75)]
    if typos and "split" not in known:
        return {}, f"unknown column {typos[0]!r}; did you mean 'split'?"
    return known, ""


def _note_unused(found: Listing, names: list[str]) -> None:
    if names:
        found.notes.append(f"columns of the manifest that are not used: {format_names(names, _MAX_COLUMNS)}")


def _entry(found: Listing, manifest: Path, line: int, row: dict[str, Any], real: str) -> Entry | None:
    path, label, split = row.get("path"), row.get("label"), row.get("split")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not (isinstance(path, str) and path and isinstance(label, str) and label):
        found.find("manifest-row", manifest, f"line {line}: path and label must be text and not empty")
        return None
    if not isinstance(split, str | None) or (split and split.strip().lower() not in SPLIT_WORDS):
        found.find("manifest-row", manifest, f"line {line}: split must be train, val or test, got {split!r}")
        return None
    before = len(found.findings)
    found.find_name(path, path)
    found.find_name(label, label)
    if len(found.findings) > before:  # a path with such characters could not even be looked up
        return None
    name, kind, problem = _name(manifest.parent, path, real, follow=found.follow_links)
    if problem:
        found.find(kind, manifest, f"line {line}: {problem}")
        return None
    return Entry(name, label, SPLIT_WORDS[split.strip().lower()] if split else None)


def _name(folder: Path, path: str, real: str, *, follow: bool) -> tuple[str, str, str]:
    """A row's path as the name of an entry, or the kind and the reason why there is none."""
    if "\\" in path and not os.path.lexists(folder / path):
        if _DRIVE.match(path):
            return "", "link-out", f"{path!r} is a path of a Windows drive; give paths relative to the manifest"
        path = path.replace("\\", "/")
    elif "\\" in path and os.path.lexists(folder / path.replace("\\", "/")):
        return "", "manifest-row", f"{path!r} may be two files, with a backslash in the name or in a folder; rename one"
    name = PurePosixPath(path)
    target = os.path.realpath(folder / name)
    inside = is_below(target, real)
    if not inside and not follow:
        return "", "link-out", f"{path!r} leads out of the manifest's folder, {real}"
    if name.is_absolute() or ".." in name.parts:
        plain = os.path.normpath(os.path.join(os.path.abspath(folder), name))
        beside = os.path.abspath(folder)
        if is_below(plain, beside) and plain != beside and os.path.realpath(plain) == target:
            return os.path.relpath(plain, beside).replace(os.sep, "/"), "", ""
        if inside and target != real:
            return os.path.relpath(target, real).replace(os.sep, "/"), "", ""
        return PurePosixPath(plain).as_posix(), "", ""
    return name.as_posix(), "", ""


def _drop_repeated(found: Listing, path: Path, entries: list[Entry]) -> list[Entry]:
    counts = Counter(entry.name for entry in entries)
    kept: dict[str, Entry] = {}
    labels: dict[str, set[str]] = {}
    for entry in entries:
        kept.setdefault(entry.name, entry)
        if counts[entry.name] > 1:
            labels.setdefault(entry.name, set()).add(entry.label)
    for name, under in labels.items():
        words = f", under the labels {', '.join(map(repr, sorted(under)))}" if len(under) > 1 else ""
        found.find("listed-twice", path, f"{name} is listed {counts[name]} times{words}", name)
    return list(kept.values())


def _check_splits(found: Listing, path: Path) -> None:
    given = [entry.split for entry in found.entries if entry.split is not None]
    if 0 < len(given) < len(found.entries):
        reason = f"{len(given)} of {len(found.entries)} rows name a split: all of them must, or none"
        found.find("manifest", path, reason)
    if given and "train" not in given:
        found.find("manifest", path, "no row has the split train")
