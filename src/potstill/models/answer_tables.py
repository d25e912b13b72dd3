"""Tables of answers: outputs of any program or service for each image, by the image's path.  No torch here.

CSV and Parquet have a row for each image: its path in the column ``path``, and a column of numbers for each class,
named as the class.  ``logit_``, ``probability_`` or ``embedding_`` before all names states what the numbers are.  A
Parquet file may have one column of lists instead, ``logits``, ``probabilities`` or ``embeddings``, with the class names
as JSON under ``classes`` in the metadata of its schema.  An npz file has the arrays ``paths`` [N], one of these three
[N, D], and ``classes`` [D] if it has them.
"""

import csv
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ArtifactError, DataError, UsageError, first_line
from potstill.formatting import format_names

AnswerKind = Literal["probabilities", "logits", "embeddings"]
KINDS: tuple[AnswerKind, ...] = ("probabilities", "logits", "embeddings")
_PREFIXES: Mapping[str, AnswerKind] = {
    "probability_": "probabilities",
    "logit_": "logits",
    "embedding_": "embeddings",
}
_PATH_COLUMNS = ("path", "paths", "file", "filename", "image")
_SUM_TOLERANCE = 0.02  # of probabilities that were written with few digits
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class AnswerTable:
    """Answers for N images."""

    origin: str  # the file, for messages
    paths: tuple[str, ...]  # [N], different from each other, with forward slashes
    values: NDArray[np.float32]  # [N, D], finite; rows of probabilities sum to 1
    kind: AnswerKind
    class_names: tuple[str, ...] | None = None  # [D], if the file names them; never of embeddings

    def __post_init__(self) -> None:
        _check_values(self)

    def logits(self) -> NDArray[np.float32]:
        """Return logits [N, K]: the values, or the logarithms of probabilities."""
        if self.kind == "embeddings":
            raise UsageError(f"{self.origin} has embeddings, and logits or probabilities of the classes are needed")
        return self.values if self.kind == "logits" else np.log(np.maximum(self.values, _SMALLEST))


def find_rows(paths: Sequence[str], names: Sequence[str], origin: str, folder: str = "") -> NDArray[np.int64]:
    """Return the row [M] of each image, by its path in the data folder, or behind the name ``folder`` of that."""
    rows = {path: row for row, path in enumerate(paths)}
    found = [rows.get(f"{folder}/{name}", rows.get(name, -1)) if folder else rows.get(name, -1) for name in names]
    if missing := [name for name, row in zip(names, found, strict=True) if row < 0]:
        used = set(found)
        unused = [path for row, path in enumerate(paths) if row not in used]
        text = f"{origin} has no row for {len(missing):,} of {len(names):,} images, such as {missing[0]!r}"
        if unused:
            text += f"; {len(unused):,} of its {len(paths):,} rows belong to none of them, such as {unused[0]!r}"
        raise DataError(f"{text}.\nPaths are relative to the data folder, with forward slashes{_prefix(unused, names)}")
    return np.asarray(found, dtype=np.int64)


def read_answers(path: Path) -> AnswerTable:
    """Read a table; the last one is kept in memory as long as the file does not change."""
    try:
        state = path.stat()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _read(path: Path, modified: int, size: int) -> AnswerTable:
    readers: dict[str, Callable[[Path], tuple[Any, ...]]] = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".npz": _read_npz,
    }
    try:
        paths, values, kind, names = readers[path.suffix](path)
    except (ArtifactError, DataError, UsageError):
        raise
    except Exception as error:  # damaged bytes make these parsers raise nearly anything
        raise ArtifactError(f"{path} cannot be read as a table of answers: {first_line(error)}") from error
    plain = tuple(str(PurePosixPath(str(each).replace("\\", "/"))) for each in paths)
    doubled = [(name, count) for name, count in Counter(plain).items() if count > 1]
    if doubled:
        raise DataError(
            f"{path} has several rows for {len(doubled):,} images, such as {doubled[0][1]} for {doubled[0][0]!r}; "
            "write one row for each image"
        )
    if values.ndim != 2 or len(values) != len(plain) or values.shape[1] < 2 or not len(plain):
        raise ArtifactError(f"{path} has {len(plain):,} paths and values of shape {list(values.shape)}, not [N, D]")
    if values.dtype.kind not in "fiu":
        raise ArtifactError(f"{path} has values of type {values.dtype}, and real numbers are needed")
    with np.errstate(over="ignore"):  # infinite numbers are refused
        numbers = values.astype(np.float32)
    return AnswerTable(str(path), plain, numbers, kind or _guess_kind(values, path, plain), names)


def _read_csv(path: Path) -> tuple[Any, ...]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=lambda each: (first.count(each), each == ","))
        lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        header = next(lines, [])
        at = _path_column(header, path)
        if "prediction" in header and any(name == "p_1" or name.startswith("p:") for name in header):
            raise ArtifactError(
                f"{path} has predictions of potstill, for one split or the first classes only: give the model that "
                "made them, --teacher RUN or --teacher RUN/STAGE"
            )
        paths, rows = [], []
        for number, line in enumerate(lines, start=2):
            if not any(line):
                continue
            if len(line) != len(header):
                raise ArtifactError(f"{path}, line {number}: {len(line)} values, and the header has {len(header)}")
            paths.append(line.pop(at))
            try:
                rows.append(np.array(line, dtype=np.float32))
            except ValueError:
                column, text = next(
                    pair for pair in zip(_without(header, at), line, strict=True) if not _is_number(pair[1])
                )
                raise ArtifactError(
                    f"{path}, line {number}: column {column!r} has no number, but {text!r}: every column but the "
                    "path's is a class; leave other columns out, and write numbers with a point"
                ) from None
    values = np.stack(rows) if rows else np.zeros((0, len(header)), np.float32)
    return (paths, values, *_column_names(_without(header, at)))


def _read_parquet(path: Path) -> tuple[Any, ...]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{path} needs pyarrow, not installed here\n"
            'Install: pip install "potstill[datasets]"; or write the table as .csv or .npz'
        ) from error
    table = pyarrow.parquet.read_table(path)
    header = list(table.column_names)
    at = _path_column(header, path)
    paths = table.column(at).to_pylist()
    lists = [kind for kind in KINDS if kind in header]
    if lists:
        if len(lists) > 1:
            raise ArtifactError(f"{path} has the columns {' and '.join(lists)}: keep one of them")
        names = json.loads((table.schema.metadata or {}).get(b"classes", b"null"))
        column = table.column(lists[0]).to_pylist()
        if len({len(row) for row in column}) > 1:
            raise ArtifactError(f"{path}: the lists in column {lists[0]!r} are not of the same length")
        values = np.array(column, dtype=np.float32).reshape(len(column), -1)
        return paths, values, lists[0], None if names is None else tuple(map(str, names))
    columns = [np.asarray(table.column(name).to_numpy(), np.float32) for name in _without(header, at)]
    return (paths, np.stack(columns, axis=1), *_column_names(_without(header, at)))


def _read_npz(path: Path) -> tuple[Any, ...]:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ArtifactError(f"{path} is compressed, so a small file could fill the memory: use numpy.savez")
    with np.load(path, allow_pickle=False) as arrays:
        kinds = [kind for kind in KINDS if kind in arrays]
        if "paths" not in arrays or len(kinds) != 1:
            raise ArtifactError(
                f"{path} has the arrays {format_names(sorted(arrays), 8)}; a table of answers has 'paths' and one of "
                f"{', '.join(KINDS)}: numpy.savez({path.name!r}, paths=..., logits=..., classes=[...])"
            )
        names = tuple(map(str, arrays["classes"].tolist())) if "classes" in arrays else None
        return arrays["paths"].tolist(), arrays[kinds[0]], kinds[0], names


def _path_column(header: Sequence[str], path: Path) -> int:
    found = [at for at, name in enumerate(header) if name.strip().casefold() in _PATH_COLUMNS]
    if len(found) != 1:
        raise ArtifactError(
            f"{path} has {'no column' if not found else 'several columns'} with paths: call one column 'path'; its "
            f"columns are {format_names(list(header), 8)}"
        )
    return found[0]


def _without(header: Sequence[str], at: int) -> list[str]:
    return [*header[:at], *header[at + 1 :]]


def _column_names(names: Sequence[str]) -> tuple[AnswerKind | None, tuple[str, ...] | None]:
    for prefix, kind in _PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            return kind, None if kind == "embeddings" else tuple(name.removeprefix(prefix) for name in names)
    return None, tuple(names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _guess_kind(values: NDArray[Any], path: Path, paths: Sequence[str]) -> AnswerKind:
    """Return probabilities if all rows are such, logits if a number is outside [0, 1] and most rows are no shares."""
    if not np.isfinite(values).all():
        return "logits"  # refused by ``_check_values``
    sums = values.sum(axis=1, dtype=np.float64)
    positive = values.min(axis=1) >= 0
    shares = positive & (np.abs(sums - 1) <= _SUM_TOLERANCE)
    if shares.all():
        return "probabilities"
    wrong = int(np.flatnonzero(~shares)[0])
    advice = "If they are logits, write 'logit_' before the names of the columns; "
    total = float(np.median(sums))  # of percentages, votes, or probabilities in 8 bits
    if total > 1 and not shares.any() and (positive & (np.abs(sums / total - 1) <= _SUM_TOLERANCE)).mean() > 0.5:
        raise DataError(
            f"{path}: the rows seem to be shares that sum to {total:.4g}: divide them by their sum.\n{advice[:-2]}"
        )
    if 2 * shares.sum() > len(values) or (values.min() >= 0 and values.max() <= 1):
        what = "most rows are probabilities" if shares.any() else "all numbers are from 0 to 1"
        raise DataError(
            f"{path}: {what}, but {int((~shares).sum()):,} of {len(values):,} rows do not sum to 1 or have a number "
            f"below 0, such as {paths[wrong]!r} with the sum {sums[wrong]:.4g}.\n{advice}if a class is missing, add it"
        )
    return "logits"


def _check_values(table: AnswerTable) -> None:
    finite = np.isfinite(table.values).all(axis=1)
    if not finite.all():
        first = table.paths[int(np.flatnonzero(~finite)[0])]
        raise DataError(
            f"{table.origin}: {int((~finite).sum()):,} of {len(table.values):,} rows have a number that is NaN or "
            f"infinite, such as that of {first!r}"
        )
    names = table.class_names or ()
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ArtifactError(f"{table.origin} has several columns for the class {twice[0]!r}: keep one of them")
    if table.class_names is not None and len(table.class_names) != table.values.shape[1]:
        raise ArtifactError(
            f"{table.origin} names {len(table.class_names)} classes and has {table.values.shape[1]} values in a row"
        )
    if table.kind == "probabilities":
        sums = table.values.sum(axis=1, dtype=np.float64)
        negative = np.asarray(table.values.min(axis=1) < 0)
        wrong = np.flatnonzero((np.abs(sums - 1) > _SUM_TOLERANCE).astype(bool) | negative)
        if len(wrong):
            raise DataError(
                f"{table.origin}: {len(wrong):,} of {len(sums):,} rows are no probabilities, such as that of "
                f"{table.paths[wrong[0]]!r}, which sums to {sums[wrong[0]]:.4g}: each must be at least 0, and their "
                "sum 1"
            )


def _prefix(unused: Sequence[str], names: Sequence[str]) -> str:
    """Return advice for paths that only have too many folders in front, or too few."""
    known = set(names)
    for path in unused[:1]:
        parts = path.split("/")
        for at in range(1, len(parts)):
            if "/".join(parts[at:]) in known:
                return f": cut off {'/'.join(parts[:at]) + '/'!r}"
        if whole := next((name for name in names if name.endswith(f"/{path}")), None):
            return f": write {whole!r} in place of {path!r}"
    return ""
