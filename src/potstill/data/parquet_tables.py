"""Parquet files with a column of images and one of labels, as the Hugging Face hub keeps data sets.

The bytes of each image are written once to a file of their own below the cache folder, ``TABLE.parquet/ROW``, with rows
counted from 0.  From then on they are files like those of a folder.

Images: bytes, or a struct with the field ``bytes``.  Labels: whole numbers with the class names of the hub's schema
(``ClassLabel``), whole numbers without names, or text.  Splits: the first word of a file's name, or a folder's name,
as in ``data/train-00000-of-00002.parquet`` and ``default/test/0000.parquet``.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.data.concurrency import ProgressReporter, interprocess_lock
from potstill.data.entries import SPLIT_WORDS, Entry, Finding, Listing
from potstill.data.image_io import MAX_BYTES
from potstill.data.settings import DataSettings, Options, read_options
from potstill.data.shard_reader import MAX_CLASS_LENGTH
from potstill.data.sources import find_tables
from potstill.errors import ArtifactError, DataError, StorageError, UsageError, did_you_mean, first_line
from potstill.formatting import format_names
from potstill.hub import fetch_dataset, is_hub_dataset
from potstill.io import cache_folder, read_checksummed_json, sha256_hex, write_checksummed_json

FORMAT = 2
_UNUSED_SECONDS = 86_400.0  # without use, after which images of tables that are gone or changed are removed
ROWS_FILE = "rows.json"  # written last, so a folder without it is incomplete
IMAGE_NAMES = ("image", "img", "picture", "photo", "bytes")
LABEL_NAMES = ("label", "labels", "class", "target", "class_name", "category", "fine_label")
_BATCH = 8  # rows in memory at once
_BUFFER = 2**20  # bytes of a file that are read at once; without it, all of a row group
_MOST_TIMES = 20  # size of the images, as a multiple of that of their file: a small file could fill the disk
_MAX_ROW_FINDINGS = 1000  # of a table


class TableOptions(Options):
    """Options of Parquet files."""

    image: str | None = None  # column of the images; None: the only one, or by its name
    label: str | None = None  # column of the labels


@dataclass
class _Table:
    image: str
    label: str
    names: list[str] | None  # of the labels, if the schema has them
    in_struct: bool  # the bytes are the field of a struct


def check_table(settings: DataSettings) -> None:
    """Check names, options and the installed packages, without reading a table."""
    read_options(settings, TableOptions)
    if not is_hub_dataset(settings.source) and not Path(settings.source).expanduser().exists():
        raise UsageError(f"data {settings.source!r}: no such file")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'data {settings.source!r}: Parquet files need pyarrow\nInstall: pip install "potstill[datasets]"'
        ) from error


def read_tables(settings: DataSettings, progress: ProgressReporter | None = None) -> Listing:
    """List all rows as files below the cache folder, which are written if they are not there."""
    check_table(settings)
    options, kind, place = read_options(settings, TableOptions), "tables", Path(settings.source).expanduser()
    if is_hub_dataset(settings.source):
        fetched = fetch_dataset(settings.source)
        place, kind = fetched.folder, f"tables of {fetched.name}"
        files = [place / name for name in fetched.files]
    else:
        files = [place] if place.is_file() else find_tables(place)
        place = place.parent if place.is_file() else place
    names = [file.relative_to(place).as_posix() for file in files]
    states = [(name, *_state(file)) for name, file in zip(names, files, strict=True)]
    key = sha256_hex(json.dumps([FORMAT, os.path.abspath(place), states, options.model_dump()]).encode())[:32]
    root = cache_folder("tables", key)
    listing = Listing(root, kind, follow_links=settings.follow_links, place=place)
    splits = _splits(listing, names)
    with interprocess_lock(cache_folder("locks", f"{key}.lock"), "unpacks these tables", progress):
        tables = _unpacked(root, names)
        if tables is None:
            remove_outdated_images()
            tables = _unpack(root, files, names, options, progress)
    with contextlib.suppress(OSError):  # time of the last use
        os.utime(root / ROWS_FILE)
    for name in names:
        found = tables[name]
        for row, label in found["rows"]:
            listing.entries.append(Entry(f"{name}/{row}", label, splits[name]))
        listing.findings += [Finding(*each) for each in found["findings"]]
        listing.notes += [note for note in found["notes"] if note not in listing.notes]
        for label in dict.fromkeys(label for _, label in found["rows"]):
            listing.check_name(name, label)
    listing.entries.sort(key=lambda entry: entry.name)
    if not listing.entries and not listing.findings:
        listing.report("no-classes", ".", "the tables have no rows")
    return listing


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _splits(listing: Listing, names: Sequence[str]) -> dict[str, str | None]:
    """Return the split of each table; a single one has none."""
    if len(names) == 1:
        return {names[0]: None}
    splits: dict[str, str | None] = {}
    subsets: dict[str, None] = {}  # folders that are neither splits nor "data": several would be several data sets
    for name in names:
        *folders, file = name.lower().split("/")
        words = [re.split(r"[-_.]", file)[0], *reversed(folders)]
        splits[name] = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
        subsets["/".join(part for part in name.split("/")[:-1] if part.lower() not in {*SPLIT_WORDS, "data"})] = None
    given = {split for split in splits.values() if split is not None}
    if len(subsets) > 1:
        listing.report(
            "split-folders",
            ".",
            f"the folders {format_names(list(subsets), 5)} are several data sets; add the name of one to the address, "
            f"as in .../{next(iter(subsets))}",
        )
    elif given and None in splits.values():
        without = [name for name, split in splits.items() if split is None]
        reason = f"{format_names(without, 3)}: the name begins with no split (train, val, test), as others do"
        listing.report("split-folders", ".", reason)
    elif given and "train" not in given:
        listing.report("no-train", ".", f"there is {' and '.join(sorted(given))}, but no table train")
    return splits


def _unpacked(root: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """Return what ``_unpack`` recorded; None if it did not finish."""
    try:
        found: dict[str, Any] = read_checksummed_json(root / ROWS_FILE)["tables"]
        return found if set(found) == set(names) else None
    except (ArtifactError, KeyError, TypeError):
        return None


def _unpack(
    root: Path, files: Sequence[Path], names: Sequence[str], options: TableOptions, progress: ProgressReporter | None
) -> dict[str, Any]:
    """Write the images of all rows; return for each table its rows (number, class name), findings and notes."""
    size = sum(file.stat().st_size for file in files)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    if (free := shutil.disk_usage(root).free) < size:
        raise StorageError(
            f"the images of {files[0].parent} need {size / 2**30:.1f} GiB in {root}, which has {free / 2**30:.1f} GiB "
            "left; POTSTILL_CACHE names another folder"
        )
    tables: dict[str, Any] = {}
    for at, (name, file) in enumerate(zip(names, files, strict=True)):
        tables[name] = _unpack_table(root, file, name, options)
        if progress is not None:
            progress.wait("unpacking tables", at + 1, len(files))
    states = [[str(file.resolve()), *_state(file)] for file in files]
    write_checksummed_json(root / ROWS_FILE, {"tables": tables, "files": states})
    return tables


def remove_outdated_images() -> None:
    """Remove the images of tables that are gone, or have changed, and that no run has used for a day."""
    for rows in cache_folder("tables").glob(f"*/{ROWS_FILE}"):
        try:
            if time.time() - rows.stat().st_mtime > _UNUSED_SECONDS and not _is_current(rows):
                shutil.rmtree(rows.parent, ignore_errors=True)
        except OSError:
            continue


def remove_unpacked_images() -> int:
    """Remove the images of all tables; return their bytes."""
    folder = cache_folder("tables")
    freed = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def _is_current(rows: Path) -> bool:
    try:
        files = read_checksummed_json(rows)["files"]
        return all(_state(Path(path)) == (size, modified) for path, size, modified in files)
    except (ArtifactError, KeyError, TypeError, ValueError, OSError):
        return False


def _unpack_table(root: Path, file: Path, name: str, options: TableOptions) -> dict[str, Any]:
    import pyarrow.compute as compute
    import pyarrow.parquet as pq

    folder, rows, findings = root / name, list[tuple[int, str]](), list[tuple[str, str, str]]()
    folder.mkdir(parents=True)
    with _table_errors(file), pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as parquet:
        table = _find_columns(file, parquet.schema_arrow, options)
        unused = [each for each in parquet.schema_arrow.names if each not in (table.image, table.label)]
        row, written, most = 0, 0, _MOST_TIMES * file.stat().st_size + MAX_BYTES
        for batch in parquet.iter_batches(_BATCH, columns=[table.image, table.label], use_threads=False):
            images, labels = batch.column(table.image), batch.column(table.label)
            if table.in_struct:
                images = compute.struct_field(images, "bytes")  # null where the struct is
            for image, label in zip(images, labels, strict=True):
                content = image.as_buffer()
                text, problem = _label_text(label.as_py(), table)
                if content is None:
                    problem = f"no bytes of an image in column {table.image!r}"
                if not problem:
                    part = memoryview(content)[: MAX_BYTES + 1]  # enough to be found too large
                    if (written := written + len(part)) > most:
                        raise DataError(
                            f"{file}: its images take more than {_MOST_TIMES} times the bytes of the file; one "
                            "image is repeated many times, or they are not compressed: write them as JPEG or PNG"
                        )
                    (folder / str(row)).write_bytes(part)
                    rows.append((row, text))
                elif len(findings) < _MAX_ROW_FINDINGS:
                    findings.append(("table-row", f"{name}/{row}", problem))
                row += 1
    if not rows and findings:
        findings = [("table", name, f"none of its {row:,} rows can be used; the first: {findings[0][2]}")]
    notes = [f"columns of the tables that are not used: {format_names(unused, 5)}"] if unused else []
    return {"rows": rows, "findings": findings, "notes": notes}


@contextmanager
def _table_errors(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into one DataError."""
    try:
        yield
    except (DataError, UsageError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # of this system, not of pyarrow
            raise
        raise DataError(f"{file}: damaged or no Parquet file ({first_line(error)})") from error
    except Exception as error:  # damaged bytes make it raise nearly anything
        raise DataError(f"{file}: damaged or no Parquet file ({first_line(error)})") from error


def _label_text(label: Any, table: _Table) -> tuple[str, str]:
    if label is None or label == "":
        return "", f"no label in column {table.label!r}"
    if isinstance(label, bool) or not isinstance(label, int) or table.names is None:
        text = str(label)
        if len(text) > MAX_CLASS_LENGTH:
            return "", f"a class of {len(text):,} characters ({text[:20]!r}...); at most {MAX_CLASS_LENGTH}"
        return text, ""
    if 0 <= label < len(table.names):
        return table.names[label], ""
    if label == -1:
        return "", f"the label -1 of column {table.label!r} means: no label"
    last = len(table.names) - 1
    return "", f"the label {label} of column {table.label!r} is out of range: its {last + 1} classes are 0 to {last}"


def _find_columns(file: Path, schema: Any, options: TableOptions) -> _Table:
    """Return the columns of images and labels; DataError, which lists the columns, if there are none or several."""
    features = _features(schema)
    types = {field.name: field.type for field in schema}
    images = [name for name, kind in types.items() if _is_bytes(kind)]
    labels = [name for name, kind in types.items() if _is_label(kind)]
    image = _choose(file, types, images, options.image, IMAGE_NAMES, "image", "bytes, or a struct with the field bytes")
    classes = [name for name in labels if isinstance(features.get(name), dict) and features[name].get("names")]
    label = _choose(
        file, types, labels, options.label, LABEL_NAMES, "label", "whole numbers or text",
        preferred=classes if len(classes) == 1 else [],
    )  # fmt: skip
    names = features[label]["names"] if label in classes else None
    if names is not None and (not isinstance(names, list) or len({*map(str, names)}) < len(names)):
        raise DataError(f"{file}: the class names of column {label!r} must be a list of different names")
    return _Table(image, label, None if names is None else [str(name) for name in names], "struct" in str(types[image]))


def _choose(
    file: Path, types: dict[str, Any], fitting: list[str], given: str | None, usual: Sequence[str], role: str,
    meaning: str, *, preferred: Sequence[str] = (),
) -> str:  # fmt: skip
    listed = ", ".join(f"{name} ({str(kind)[:40]})" for name, kind in types.items())
    if given is not None:
        if given not in types:
            raise DataError(f"{file}: there is no column {given!r}{did_you_mean(given, types)}; it has {listed[:500]}")
        if given not in fitting:
            raise DataError(f"{file}: column {given!r} has the type {types[given]}; {role}s are {meaning}")
        return given
    found = [name for word in usual for name in fitting if name.lower() == word]
    if found or len(fitting) == 1 or preferred:
        return [*preferred, *found, *fitting][0]
    advice = f"name it with --set data.options.{role}=COLUMN" if fitting else f"its values would be {meaning}"
    near = did_you_mean(role, [name for name in types if name not in fitting])
    if not fitting and role in types and role == "image":
        near, advice = "", f"{advice}; a table of paths is a manifest (.csv, .jsonl)"
    raise DataError(f"{file}: no column of {role}s among {listed[:500]}{near}; {advice}")


def _features(schema: Any) -> dict[str, Any]:
    """Return the types of the columns that the hub's library wrote into the schema; empty if there are none."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind))


def _is_label(kind: Any) -> bool:
    import pyarrow.types as kinds

    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
    return bool(text or kinds.is_integer(kind) or kinds.is_boolean(kind))
