"""Manifests: a CSV file with the header ``path,label`` or ``path,label,split``, or JSON lines with these keys.

Paths are relative to the manifest's folder.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from potstill.data.listing import SPLIT_WORDS, Entry, name_problem, refuse
from potstill.errors import DataError, nearest

SUFFIXES = (".csv", ".jsonl")
_KEYS = ("path", "label", "split")


def list_manifest(path: Path) -> list[Entry]:
    """All images of a manifest, sorted by name.

    Raises:
        DataError: unreadable, unknown columns, rows without path or label, paths out of the manifest's folder or
            listed twice, unknown splits, a split in some rows only; all of them in one message.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a manifest is UTF-8 text ({error.reason} at byte {error.start})") from error
    problems: list[str] = []
    rows = _csv_rows(path, text, problems) if path.suffix.lower() == ".csv" else _json_rows(text, problems)
    entries = [entry for line, row in rows if (entry := _entry(path.parent, line, row, problems)) is not None]
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            problems.append(f"{name} is listed {count} times")
    with_split = sum(entry.split is not None for entry in entries)
    if 0 < with_split < len(entries):
        problems.append(f"{with_split} of {len(entries)} rows name a split: all of them must, or none")
    if with_split and all(entry.split != "train" for entry in entries):
        problems.append("no row has the split train")
    refuse(str(path), problems)
    if not entries:
        raise DataError(f"{path}: lists no images")
    return sorted(entries, key=lambda entry: entry.name)


def _csv_rows(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or [])
        unknown = [name for name in header if name not in _KEYS]
        if unknown or not {"path", "label"} <= set(header) or len(set(header)) < len(header):
            hint = nearest(unknown[0], _KEYS) if unknown else ""
            raise DataError(f"{path}: the header must be path,label or path,label,split, got {','.join(header)}{hint}")
        for row in reader:
            if None in row or None in row.values():
                problems.append(f"line {reader.line_num}: {len(header)} columns expected")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")


def _json_rows(text: str, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: no JSON ({error})")
            continue
        if not isinstance(row, dict) or (unknown := sorted(set(row) - set(_KEYS))):
            found = (
                f"the unknown key {unknown[0]!r}{nearest(unknown[0], _KEYS)}" if isinstance(row, dict) else "no object"
            )
            problems.append(f"line {number}: the keys are path, label and split; got {found}")
            continue
        yield number, row


def _entry(folder: Path, line: int, row: dict[str, Any], problems: list[str]) -> Entry | None:
    path, label, split = row.get("path"), row.get("label"), row.get("split")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not (isinstance(path, str) and path and isinstance(label, str) and label):
        problems.append(f"line {line}: path and label must be text and not empty")
        return None
    word = split.lower() if isinstance(split, str) else split
    if word and word not in SPLIT_WORDS:
        problems.append(f"line {line}: split must be train, val or test, got {split!r}")
        return None
    name = PurePosixPath(path)
    if name.is_absolute() or ".." in name.parts or not (folder / name).resolve().is_relative_to(folder.resolve()):
        problems.append(f"line {line}: {path!r} leads out of the manifest's folder")
        return None
    if problem := name_problem(path) or name_problem(label):
        problems.append(f"line {line}: {problem}")
        return None
    return Entry(name.as_posix(), label, SPLIT_WORDS[word] if word else None)
