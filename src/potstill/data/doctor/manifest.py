"""A reading of a manifest that goes on after every problem.

A CSV file with the header ``path,label`` or ``path,label,split``, or JSON lines with these keys.  Paths are relative
to the manifest's folder.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from potstill.data.doctor.listing import Listing, below
from potstill.data.listing import SPLIT_WORDS, Entry
from potstill.errors import nearest

SUFFIXES = (".csv", ".jsonl")
MOST_BYTES = 256 * 2**20  # of a manifest: some millions of rows
_KEYS = ("path", "label", "split")

Row = tuple[int, dict[str, Any]]  # number of its line, and what it holds


def read_manifest(path: Path) -> Listing:
    """All rows that can be used, and all problems of the others; of a file that is listed twice, the first row."""
    found = Listing(path.parent, "manifest")
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
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or [])
        unknown = [name for name in header if name not in _KEYS]
        if unknown or not {"path", "label"} <= set(header) or len(set(header)) < len(header):
            if not found.findings:  # else there is no text
                hint = nearest(unknown[0], _KEYS) if unknown else ""
                got = ",".join(header)
                found.find("manifest", path, f"the header must be path,label or path,label,split, got {got}{hint}")
            return
        for row in reader:
            if None in row or None in row.values():
                found.find("manifest", path, f"line {reader.line_num}: {len(header)} columns expected")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        found.find("manifest", path, f"line {reader.line_num}: {error}; what follows was not read")


def _json_rows(found: Listing, path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
            found.find("manifest", path, f"line {number}: no JSON that can be read ({words})")
            continue
        if not isinstance(row, dict):
            found.find("manifest", path, f"line {number}: the keys are path, label and split; got no object")
        elif unknown := sorted(set(row) - set(_KEYS)):
            got = f"the unknown key {unknown[0]!r}{nearest(unknown[0], _KEYS)}"
            found.find("manifest", path, f"line {number}: the keys are path, label and split; got {got}")
        else:
            yield number, row


def _entry(found: Listing, manifest: Path, line: int, row: dict[str, Any], real: str) -> Entry | None:
    path, label, split = row.get("path"), row.get("label"), row.get("split")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not (isinstance(path, str) and path and isinstance(label, str) and label):
        found.find("manifest", manifest, f"line {line}: path and label must be text and not empty")
        return None
    if not isinstance(split, str | None) or (split and split.lower() not in SPLIT_WORDS):
        found.find("manifest", manifest, f"line {line}: split must be train, val or test, got {split!r}")
        return None
    before = len(found.findings)
    found.find_name(path, path)
    found.find_name(label, label)
    if len(found.findings) > before:  # a path with such characters could not even be looked up
        return None
    name = PurePosixPath(path)
    if name.is_absolute() or ".." in name.parts or not below(os.path.realpath(manifest.parent / name), real):
        found.find("link-out", manifest, f"line {line}: {path!r} leads out of the manifest's folder")
        return None
    return Entry(name.as_posix(), label, SPLIT_WORDS[split.lower()] if split else None)


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
