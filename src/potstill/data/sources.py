"""List the images of a folder or a manifest; the listing continues after every problem and collects them all.

Folder: ``DIR/{train,val,test}/<class>/*``, or ``DIR/<class>/*``.  Every regular file below a class folder, at any
depth, counts as an image and must decode, except hidden files (a leading dot) and system files (the lists in
``data.entries``); both are counted.  Files beside the class folders are not read, but counted.  Links to
files inside the data folder are followed; links out of it, and links to folders, are refused unless ``follow_links``.

Manifest: a CSV file with the header ``path,label`` or ``path,label,split``, or JSON lines with these keys; the columns
may have other usual names, and further columns are not used.  Paths are relative to the manifest's folder, or absolute.
"""

import codecs
import csv
import difflib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from potstill.data.entries import (
    SPLIT_WORDS,
    Entry,
    Listing,
    broken_link_reason,
    is_below,
    is_system_name,
)
from potstill.data.image_structure import has_image_suffix
from potstill.data.settings import DataSettings
from potstill.data.shard_reader import MAX_CLASS_LENGTH, unique_keys
from potstill.errors import did_you_mean
from potstill.formatting import format_names
from potstill.hub import HUB_DATA

_SPLITS = ("train", "val", "test")
_MAX_NAMES = 12  # names in a note


def walk_folder(root: Path, *, follow_links: bool = False) -> Listing:
    """List all images of ``root/{train,val,test}/<class>/*`` or ``root/<class>/*``, and report problems of names."""
    listing = Listing(root, "folders", follow_links=follow_links)
    real = os.path.realpath(root)
    folders = _subfolders(listing, root)
    splits = _split_folders(listing, folders)
    if splits:
        _note_files_beside(listing, root, [folder for folder in folders if all(folder != place for _, place in splits)])
    places: list[tuple[str | None, Path]] = [*splits] or [(None, root)]
    for split, place in places:
        classes = folders if place == root else _subfolders(listing, place)
        _note_files_beside(listing, place, [])
        if not classes:
            listing.report("no-classes", place, _why_no_classes(listing, place))
        for each in classes:
            _list_class(listing, each, split, real)
    _report_missing_classes(listing, splits)
    _report_splits_within_classes(listing)
    listing.entries.sort(key=lambda entry: entry.name)
    return listing


def _why_no_classes(listing: Listing, place: Path) -> str:
    links = (listing.root / each.path for each in listing.findings if each.kind in ("link-out", "link-folder"))
    if any(link.parent == place for link in links):
        return "no class folders, only links; data.follow_links: true reads them (of evaluate: --follow-links)"
    return (
        "no class folders; put the images of each class into a folder of its name; `potstill run --no-labels` learns "
        "from images without labels"
    )


def walk_images(root: Path, *, follow_links: bool = False) -> Listing:
    """List all images below a folder, at any depth and without classes, with findings on names and paths."""
    listing = Listing(root, "folders", follow_links=follow_links)
    files = _walk_files(listing, root, os.path.realpath(root))
    listing.entries = [Entry(name, "") for name in sorted(files)]
    if not listing.entries:
        listing.report("empty-class", ".", "no images")
    return listing


def _split_folders(listing: Listing, folders: list[Path]) -> list[tuple[str, Path]]:
    """Return (split, folder) pairs; none if the folders are classes."""
    named = [(SPLIT_WORDS[f.name.lower()], f) for f in folders if f.name.lower() in SPLIT_WORDS]
    splits = {split for split, _ in named}
    if not named:
        return []
    if "train" not in splits:
        if len(named) < len(folders):
            return []  # a class may be called "test"
        listing.report("no-train", ".", f"there is {' and '.join(sorted(splits))}, but no folder train")
    if splits == {"train"} and len(folders) > 1 and not any(_subfolders_silently(listing, f) for _, f in named):
        return []
    for split in _SPLITS:
        same = [folder.name for each, folder in named if each == split]
        if len(same) > 1:
            listing.report("split-folders", ".", f"{' and '.join(same)} are both folders for {split}; keep one")
    words = ", ".join(folder.name for _, folder in named)
    for folder in folders:
        if folder.name.lower() not in SPLIT_WORDS and (near := did_you_mean(folder.name.lower(), SPLIT_WORDS)):
            listing.report("split-folders", folder, f"unknown folder beside {words}{near} Rename it, or move it away")
    return named


def _list_class(listing: Listing, folder: Path, split: str | None, real: str) -> None:
    before = len(listing.entries), len(listing.findings)
    listing.check_name(folder, folder.name)
    listing.entries += (Entry(name, folder.name, split) for name in _walk_files(listing, folder, real))
    if (len(listing.entries), len(listing.findings)) == before:  # else the findings report its images
        listing.report("empty-class", folder, "no images; add some, or remove the folder")


def _walk_files(listing: Listing, folder: Path, real: str) -> Iterator[str]:
    """Yield the names of regular files at any depth, relative to the root, as text: a ``Path`` for each is slow."""
    inside = folder.relative_to(listing.root).as_posix()
    waiting = ["" if inside == "." else f"{inside}/"]
    while waiting:
        inside = waiting.pop()
        if not listing.visit(inside.rstrip("/") or "."):
            continue
        for item in _scan_folder(listing, listing.root / inside):
            name = inside + item.name
            if _is_ignored(listing, item, name):
                continue
            listing.check_name(name, item.name)
            if item.is_symlink():
                if problem := listing.link_problem(item.path, real):
                    listing.report(problem[0], name, problem[1])
                elif os.path.isdir(item.path):
                    waiting.append(f"{name}/")
                else:
                    yield name
            elif item.is_dir():
                waiting.append(f"{name}/")
            elif item.is_file():
                yield name
            else:
                listing.report("unreadable", name, "not a regular file")


def _is_ignored(listing: Listing, item: "os.DirEntry[str]", name: str) -> bool:
    """Return whether to ignore a file or folder; it is then counted, or, if it may hold images, a finding."""
    if is_system_name(item.name, item.path):
        listing.passed_over["._*" if item.name.startswith("._") else item.name] += 1
        return True
    if not item.name.startswith("."):
        return False
    if os.path.isdir(item.path):
        images = sum(has_image_suffix(file) for _, _, files in os.walk(item.path) for file in files)
        if images:
            reason = f"a hidden folder with {images:,} image{'s' if images > 1 else ''}; rename it to use them"
            listing.report("hidden", name, reason)
        else:
            listing.passed_over["hidden folders"] += 1
    elif has_image_suffix(item.name):
        listing.report("hidden", name, "a hidden file; rename it to use it")
    else:
        listing.passed_over["hidden files"] += 1
    return True


def _subfolders(listing: Listing, folder: Path) -> list[Path]:
    """Return folders that are neither hidden nor a system's, and with ``follow_links`` links to folders."""
    folders = []
    for item in _scan_folder(listing, folder):
        path = Path(item.path)
        if _is_ignored(listing, item, path.relative_to(listing.root).as_posix()):
            continue
        if not item.is_symlink():
            folders += [path] if item.is_dir() else []
        elif not os.path.exists(path):
            listing.report(
                "link-broken", path, f"{broken_link_reason(item.path)}, where class folders are; mend it, or remove it"
            )
        elif os.path.isdir(path):
            if problem := listing.link_problem(item.path, os.path.realpath(listing.root)):
                listing.report(problem[0], path, f"{problem[1]}; put the folder itself there")
            else:
                folders.append(path)
    return folders


def _subfolders_silently(listing: Listing, folder: Path) -> list[Path]:
    """Return the same as ``_subfolders``, without adding findings."""
    return _subfolders(Listing(listing.root, "folders", follow_links=listing.follow_links), folder)


def _note_files_beside(listing: Listing, folder: Path, others: list[Path]) -> None:
    """Report images and other files, and beside split folders other folders, that are not read."""
    files = [
        item.name
        for item in _scan_folder(Listing(listing.root, ""), folder)
        if not item.name.startswith(".") and os.path.isfile(item.path) and not is_system_name(item.name, item.path)
    ]
    images = [name for name in files if has_image_suffix(name)]
    if images:
        names = [(folder / name).relative_to(listing.root).as_posix() for name in images]
        number = f"{len(images):,} image{'s' if len(images) > 1 else ''} beside the class folders"
        reason = f"{number} ({format_names(images[:3])}{', ...' if len(images) > 3 else ''}); put them into one"
        listing.report("beside-classes", folder, reason, *names)
    for other in others:
        if any(each.path == other.relative_to(listing.root).as_posix() for each in listing.findings):
            continue  # a misspelt split, or a name problem
        inside = sum(has_image_suffix(file) for _, _, names in os.walk(other) for file in names)
        if inside:
            reason = f"a folder with {inside:,} image{'s' if inside > 1 else ''} beside the split folders"
            listing.report("beside-classes", other, f"{reason}; its images have no split, and are not used")
    rest = [name for name in files if name not in set(images)]
    if rest:
        where = "" if folder == listing.root else f" in {folder.relative_to(listing.root).as_posix()}"
        number = "1 other file" if len(rest) == 1 else f"{len(rest):,} other files"
        listing.notes.append(f"{number} beside the class folders{where} not read: {format_names(rest, _MAX_NAMES)}")


def _report_missing_classes(listing: Listing, splits: list[tuple[str, Path]]) -> None:
    names: dict[str, set[str]] = {}
    folders: dict[str, Path] = {}
    for split in _SPLITS:
        for each, folder in splits:
            if each == split:
                names.setdefault(split, set()).update(path.name for path in _subfolders_silently(listing, folder))
                folders.setdefault(split, folder)
    for name in sorted(set().union(*names.values())):
        has = ", ".join(folders[split].name for split in names if name in names[split])
        for split, there in names.items():
            if there and name not in there:
                place = folders[split]
                listing.report(
                    "missing-class", place / name, f"class {name!r} is missing in {place.name}; it is in {has}"
                )


def _report_splits_within_classes(listing: Listing) -> None:
    """Report ``cat/train`` and ``cat/test`` in place of ``train/cat`` and ``test/cat``, and splits one folder down."""
    within: dict[str, set[str]] = {}
    deep: set[str] = set()  # labels with folders in the folders of splits
    for entry in listing.entries:
        folders = entry.name.split("/")[1:-1]
        if entry.split is not None:
            return
        found = within.setdefault(entry.label, set())
        found.add(SPLIT_WORDS.get(folders[0].lower(), "") if folders else "")
        if len(folders) > 1 and folders[0].lower() in SPLIT_WORDS:
            deep.add(entry.label)
    split = [label for label, splits in within.items() if "train" in splits and splits & {"val", "test"}]
    if len(split) == 1 and split[0] in deep:
        place = listing.root / split[0]
        listing.report("split-folders", ".", f"the splits lie one folder further down: give {place} as the data")
    elif split and len(split) == len(within) and not any("" in splits for splits in within.values()):
        label = min(within)
        listing.report(
            "split-folders", ".",
            f"the splits lie within the classes ({label}/train): put the classes into the splits (train/{label})",
        )  # fmt: skip


def regroup(listing: Listing, settings: DataSettings) -> Listing:
    """Return a listing with the classes of ``settings.class_folder``, and the splits of ``settings.keep_splits``.

    A cross-validation pools all splits.
    """
    keep, level = "none" if settings.folds is not None else settings.keep_splits, settings.class_folder
    pooled = {"all": (), "test": ("val",), "none": _SPLITS}[keep]
    joined = "train" if keep == "test" else None
    entries = [replace(each, split=joined) if each.split in pooled else each for each in listing.entries]
    notes = list(listing.notes)
    done = []
    if keep != "all" and any(each.split for each in listing.entries):
        done.append(f"{'train and val' if keep == 'test' else 'the splits'} of the source are pooled")
    if listing.kind == "folders":
        paths = [each.name.split("/")[int(each.split is not None) : -1] for each in listing.entries]
        if level == 1:
            notes += _nested_note(listing, paths)
        else:
            entries = [replace(each, label=_name_class(path, level)) for each, path in zip(entries, paths, strict=True)]
            notes += _joined_note(paths, level)
            done.append("classes named by the last folder" if level == "last" else f"classes named by folder {level}")
    if not done:
        return replace(listing, notes=notes)
    # The classes of the splits are compared anew, by their images.
    findings = [each for each in listing.findings if each.kind != "missing-class"]
    findings = [each for each in findings if each.kind != "no-train" or keep != "none"]
    return replace(listing, entries=entries, findings=findings, notes=notes, regrouped="".join(f"; {e}" for e in done))


def _name_class(folders: list[str], level: int | str) -> str:
    return folders[-1] if isinstance(level, str) else folders[min(level, len(folders)) - 1]


def _nested_note(listing: Listing, paths: list[list[str]]) -> Iterator[str]:
    deep = [entry.name for entry, path in zip(listing.entries, paths, strict=True) if len(path) > 1]
    if deep:
        lie = "1 image lies" if len(deep) == 1 else f"{len(deep):,} images lie"
        levels: tuple[int | str, ...] = ("last", 2) if max(map(len, paths)) > 2 else ("last",)
        counts = {level: len({_name_class(path, level) for path in paths}) for level in levels}
        others = " or ".join(
            f"--set data.class_folder={level} ({count:,} classes)" for level, count in counts.items() if count > 1
        )
        yield (
            f"{lie} in folders within class folders, such as {deep[0]}; they count for the class"
            + (f"; to name classes by inner folders: {others}" if others else "")
        )


def _joined_note(paths: list[list[str]], level: int | str) -> Iterator[str]:
    """Yield a note on classes whose folders lie in several others, which may be different things."""
    places: dict[str, set[str]] = {}
    for path in paths:
        end = len(path) if level == "last" else int(level)
        places.setdefault(_name_class(path, level), set()).add("/".join(path[:end]))
    if several := {name: sorted(found) for name, found in places.items() if len(found) > 1}:
        name, found = next(iter(sorted(several.items())))
        classes = "1 class is" if len(several) == 1 else f"{len(several):,} classes are"
        yield f"{classes} made of folders of the same name in several places, such as {name!r}: {', '.join(found[:3])}"


def ignored_files_note(passed_over: Counter[str]) -> str:
    """Return a line on hidden and system files and folders, by name.

    >>> ignored_files_note(Counter({"@eaDir": 2, "hidden files": 1}))
    'passed over: 2 x @eaDir, 1 x hidden files'
    """
    names = [f"{count:,} x {name}" for name, count in passed_over.most_common()]
    return f"passed over: {format_names(names, _MAX_NAMES)}"


def _scan_folder(listing: Listing, folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        listing.report("unreadable-folder", folder, f"cannot be read ({error.strerror or error})")
        return []


MANIFEST_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
MAX_MANIFEST_BYTES = 256 * 2**20  # of a manifest: some millions of rows
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("label", "class", "target", "class_name", "category"),
    "split": ("split", "subset", "partition"),
}  # the first is preferred; of the others, only one may be present
_DELIMITERS = ",;\t"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_MAX_COLUMNS = 5  # names in a note

Row = tuple[int, dict[str, Any]]  # line number; path, label and split, if present


def read_manifest(path: Path, *, follow_links: bool = False) -> Listing:
    """List all valid rows, with findings on the others; of a file that is listed twice, the first row."""
    listing = Listing(path.parent, "manifest", follow_links=follow_links)
    text = _text(listing, path)
    rows = _json_rows(listing, path, text) if path.suffix.lower() == ".jsonl" else _csv_rows(listing, path, text)
    real = os.path.realpath(path.parent)
    entries = [entry for line, row in rows if (entry := _entry(listing, path, line, row, real)) is not None]
    listing.entries = sorted(_drop_repeated(listing, path, entries), key=lambda entry: entry.name)
    _check_splits(listing, path)
    if not listing.entries and not listing.findings:
        listing.report("no-classes", path, "lists no images")
    return listing


def _text(listing: Listing, path: Path) -> str:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            listing.report("manifest", path, f"more than {MAX_MANIFEST_BYTES // 2**20} MiB; is it a list of images?")
            return ""
        content = path.read_bytes()
    except OSError as error:
        listing.report("manifest", path, f"cannot be read ({error.strerror or error})")
        return ""
    if encoding := _guess_encoding(content[:_ENCODING_BYTES]):
        listing.report("manifest", path, f"a manifest is UTF-8 text, and this is {encoding}: save it as UTF-8")
        return ""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        listing.report("manifest", path, f"a manifest is UTF-8 text ({error.reason} at byte {error.start})")
    return ""


_ENCODING_BYTES = 4096  # which decide the encoding


def _guess_encoding(head: bytes) -> str | None:
    r"""Return the encoding of text in UTF-16 or UTF-32, by its first bytes; None for others.

    Example:
        >>> _guess_encoding("path,label".encode("utf-16")), _guess_encoding("path,label".encode("utf-16-le"))
        ('UTF-16', 'UTF-16')
        >>> _guess_encoding("path,label\ncafé.png,a".encode())
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    zeros = max(head[::2].count(0), head[1::2].count(0))  # of ASCII text in UTF-16, every second byte is 0
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or zeros > len(head) // 4:
        return "UTF-16"
    return None


def _csv_rows(listing: Listing, path: Path, text: str) -> Iterator[Row]:
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=lambda each: (first.count(each), each == ","))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = next(reader, [])
        columns, problem = _columns(header)
        if problem:
            if not listing.findings:  # else there is no text
                listing.report("manifest", path, f"the header must be path,label or path,label,split: {problem}")
            return
        _note_unused(listing, [name for name in header if name not in columns.values() and name.strip()])
        places = {role: header.index(name) for role, name in columns.items()}
        for row in reader:
            if row and len(row) != len(header):
                reason = f"line {reader.line_num}: {len(header)} columns expected, got {len(row)}"
                listing.report("manifest-row", path, reason)
            elif row:
                yield reader.line_num, {role: row[at] for role, at in places.items()}
    except csv.Error as error:
        listing.report("manifest", path, f"line {reader.line_num}: {error}; what follows was not read")


def _json_rows(listing: Listing, path: Path, text: str) -> Iterator[Row]:
    unused: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            words = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
            listing.report("manifest-row", path, f"line {number}: no JSON that can be read ({words})")
            continue
        if not isinstance(row, dict):
            listing.report("manifest-row", path, f"line {number}: the keys are path, label and split; got no object")
            continue
        columns, problem = _columns(list(row))
        if problem:
            listing.report("manifest-row", path, f"line {number}: the keys are path, label and split: {problem}")
            continue
        unused |= dict.fromkeys(name for name in row if name not in columns.values())
        yield number, {role: row[name] for role, name in columns.items()}
    _note_unused(listing, list(unused))


def _columns(header: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return the columns of path, label and split, and what is wrong with the header; other columns are allowed."""
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
    if lacking and header and has_image_suffix(header[0].strip()):
        fitting_header = ",".join(["path", "label", *(f"column{at}" for at in range(3, len(header) + 1))])
        return (
            {},
            f"the first line, {','.join(header)[:200]}, is an image: put a line such as {fitting_header} above it",
        )
    if lacking:
        near = next((each for name in rest if (each := did_you_mean(name.strip().lower(), lacking))), "")
        return {}, f"there is no column {' and '.join(lacking)}, got {','.join(header)[:200] or 'nothing'}{near}"
    typos = [name for name in rest if difflib.get_close_matches(name.lower(), ["split"], cutoff=0.75)]
    if typos and "split" not in known:
        return {}, f"unknown column {typos[0]!r}; did you mean 'split'?"
    return known, ""


def _note_unused(listing: Listing, names: list[str]) -> None:
    if names:
        listing.notes.append(f"columns of the manifest that are not used: {format_names(names, _MAX_COLUMNS)}")


def _entry(listing: Listing, manifest: Path, line: int, row: dict[str, Any], real: str) -> Entry | None:
    path, label, split = row.get("path"), row.get("label"), row.get("split")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not (isinstance(path, str) and path and isinstance(label, str) and label):
        listing.report("manifest-row", manifest, f"line {line}: path and label must be text and not empty")
        return None
    if not isinstance(split, str | None) or (split and split.strip().lower() not in SPLIT_WORDS):
        listing.report("manifest-row", manifest, f"line {line}: split must be train, val or test, got {split!r}")
        return None
    if len(label) > MAX_CLASS_LENGTH:
        reason = f"line {line}: a class of {len(label):,} characters ({label[:20]!r}...); at most {MAX_CLASS_LENGTH}"
        listing.report("manifest-row", manifest, reason)
        return None
    before = len(listing.findings)
    listing.check_name(path, path)
    listing.check_name(label, label)
    if len(listing.findings) > before:  # a path with such characters could not even be looked up
        return None
    name, kind, problem = _name(manifest.parent, path, real, follow=listing.follow_links)
    if problem:
        listing.report(kind, manifest, f"line {line}: {problem}")
        return None
    return Entry(name, label, SPLIT_WORDS[split.strip().lower()] if split else None)


def _name(folder: Path, path: str, real: str, *, follow: bool) -> tuple[str, str, str]:
    """Return the entry's name for a row's path, or kind and reason of the finding if it has none."""
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


def _drop_repeated(listing: Listing, path: Path, entries: list[Entry]) -> list[Entry]:
    counts = Counter(entry.name for entry in entries)
    kept: dict[str, Entry] = {}
    labels: dict[str, set[str]] = {}
    for entry in entries:
        kept.setdefault(entry.name, entry)
        if counts[entry.name] > 1:
            labels.setdefault(entry.name, set()).add(entry.label)
    for name, under in labels.items():
        words = f", under the labels {', '.join(map(repr, sorted(under)))}" if len(under) > 1 else ""
        listing.report("listed-twice", path, f"{name} is listed {counts[name]} times{words}", name)
    return list(kept.values())


def _check_splits(listing: Listing, path: Path) -> None:
    given = [entry.split for entry in listing.entries if entry.split is not None]
    if 0 < len(given) < len(listing.entries):
        reason = f"{len(given)} of {len(listing.entries)} rows name a split: all of them must, or none"
        listing.report("manifest", path, reason)
    if given and "train" not in given:
        listing.report("no-train", path, "no row has the split train")


TABLE_SUFFIX = ".parquet"


def is_table(source: str) -> bool:
    """Return whether a source is a Parquet file, a folder of them and no class folders, or data of the hub."""
    if source.startswith(HUB_DATA):
        return True
    path = Path(source).expanduser()
    if path.suffix.lower() == TABLE_SUFFIX:
        return not path.is_dir()
    return path.is_dir() and _has_tables(path)


def find_tables(root: Path) -> list[Path]:
    """Return the Parquet files of a folder at any depth, sorted by path, without hidden ones."""
    found = (path for path in root.rglob(f"*{TABLE_SUFFIX}") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def _has_tables(root: Path) -> bool:
    """Return whether Parquet files lie in a folder, in no folders but those of splits and ``data``."""
    try:
        inside = [path for path in root.iterdir() if not path.name.startswith(".")]
    except OSError:  # the walk of the folder reports it
        return False
    folders = [path for path in inside if path.is_dir()]
    known = [path for path in folders if path.name.lower() in SPLIT_WORDS or path.name == "data"]
    if any(path.suffix.lower() == TABLE_SUFFIX for path in inside):
        return len(known) == len(folders)
    places = known or [path / word for path in folders for word in SPLIT_WORDS]  # without listing image folders
    return any(next(place.glob(f"*{TABLE_SUFFIX}"), None) for place in places if place.is_dir())
