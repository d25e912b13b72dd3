"""A reading of a manifest that goes on after every problem.

A CSV file with the header ``path,label`` or ``path,label,split``, or JSON lines with these keys; the columns may have
other usual names, and further columns are not used.  Paths are relative to the manifest's folder, or absolute.
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

from potstill.data.doctor.listing import Listing, below
from potstill.data.listing import SPLIT_WORDS, Entry
from potstill.errors import nearest

SUFFIXES = (".csv", ".jsonl")
MOST_BYTES = 256 * 2**20  # of a manifest: some millions of rows
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("label", "class", "target", "class_name", "category"),
    "split": ("split", "subset", "partition"),
}  # the first of each wins; of the others one at most
_DELIMITERS = ",;\t"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_SHOWN = 5  # names in a note

Row = tuple[int, dict[str, Any]]  # number of its line, and path, label and split as far as it has them


def read_manifest(path: Path, *, follow_links: bool = False) -> Listing:
    """All rows that can be used, and all problems of the others; of a file that is listed twice, the first row."""
    found = Listing(path.parent, "manifest", follow_links=follow_links)
    text = _text(found, path)
    rows = _csv_rows(found, path, text) if path.suffix.lower() == ".csv" else _json_rows(found, path, text)
    real = os.path.realpath(path.parent)
    entries = [entry for line, row in rows if (entry := _entry(found, path, line, row, real)) is not None]
    found.entries = sorted(_each_once(found, path, entries), key=lambda entry: entry.name)
    _check_splits(found, path)
    if not found.entries and not found.findings:
        found.find("no-classes", path, "lists no images")
    return found


def _text(found: Listing, path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            found.find("manifest", path, f"more than {MOST_BYTES // 2**20} MiB; is it a list of images?")
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
        near = next((each for name in rest if (each := nearest(name.strip().lower(), lacking))), "")
        return {}, f"there is no column {' and '.join(lacking)}, got {','.join(header)[:200] or 'nothing'}{near}"
    typos = [name for name in rest if difflib.get_close_matches(name.lower(), ["split"], cutoff=0.75)]
    if typos and "split" not in known:
        return {}, f"unknown column {typos[0]!r}; did you mean 'split'?"
    return known, ""


def _note_unused(found: Listing, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        found.notes.append(f"columns of the manifest that are not used: {shown}")


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
    inside = below(target, real)
    if not inside and not follow:
        return "", "link-out", f"{path!r} leads out of the manifest's folder, {real}"
    if name.is_absolute() or ".." in name.parts:
        plain = os.path.normpath(os.path.join(os.path.abspath(folder), name))
        beside = os.path.abspath(folder)
        if below(plain, beside) and plain != beside and os.path.realpath(plain) == target:
            return os.path.relpath(plain, beside).replace(os.sep, "/"), "", ""
        if inside and target != real:
            return os.path.relpath(target, real).replace(os.sep, "/"), "", ""
        return PurePosixPath(plain).as_posix(), "", ""
    return name.as_posix(), "", ""


def _each_once(found: Listing, path: Path, entries: list[Entry]) -> list[Entry]:
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
