r"""How the teacher's output for one view of one image becomes a record of a fixed number of bytes, and the manifest
that says what a cache's records are outputs of. No torch here.

Kinds of records:

- ``float16``: differences of logits, ``z - max z``, so that the temperature stays free; 2 bytes a class.
- ``float32``: the logits' own bits; 4 bytes a class.
- ``top16``, for more than 64 classes: the 16 largest logits and the mass of the others; 72 bytes.

An embedding follows where a method reads one, as float32 beside float32 logits and as float16 otherwise.
All numbers are little-endian.

``top16``: with :math:`d_i = z_i - \max z` and the tail being all but the 16 largest, the tail's mass is
:math:`m(T) = \sum_{tail} e^{d_i / T}`.  Its logarithm as a function of :math:`\beta = 1 / T` is convex, is known
exactly at :math:`\beta = 0` (the logarithm of the number of classes in the tail), and is kept at T = 8, 4, 2 and 1.

The key of a cache is a digest of its manifest, so nothing stale is ever found.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ArtifactError, StorageError, UsageError
from potstill.io import read_bytes, read_checksummed_json, write_checksummed_json

TOP_CLASSES = 16
TAIL_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
_TAIL_BETAS = np.array([0.0, *(1 / t for t in reversed(TAIL_TEMPERATURES))])  # beta, rising

Floats = NDArray[np.float32]


def top16_fields(classes: int) -> list[tuple[str, str, int]]:
    """Name, kind and size of each field of a record."""
    return [
        ("index", "<u2" if classes <= 1 << 16 else "<u4", TOP_CLASSES),
        ("logits", "<f2", TOP_CLASSES),
        ("tail", "<f2", 4),
    ]


def encode_top16(differences: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """What is kept of ``z - max z``, shape [B, K].

    Returns:
        The classes of the 16 largest, largest first; their differences; log m(T) for each of ``TAIL_TEMPERATURES``.
    """
    top = np.argpartition(-differences, TOP_CLASSES - 1, axis=1)[:, :TOP_CLASSES]
    order = np.lexsort((top, -np.take_along_axis(differences, top, axis=1)), axis=1)  # of equals, the lower class
    top = np.take_along_axis(top, order, axis=1)
    kept = np.take_along_axis(differences, top, axis=1)
    others = differences.copy()
    np.put_along_axis(others, top, -np.inf, axis=1)
    highest = others.max(axis=1, keepdims=True)
    power = np.exp((others - highest) / TAIL_TEMPERATURES[-1])
    masses = []
    for temperature in reversed(TAIL_TEMPERATURES):  # the next lower temperature: each power squared
        masses.append(np.log(power.sum(axis=1)) + highest[:, 0] / temperature)
        power *= power
    return top, kept, np.stack(masses[::-1], axis=1)


def decode_top16(index: NDArray[np.int64], kept: Floats, tail: Floats, *, classes: int, temperature: float) -> Floats:
    """Logits [B, K] whose softmax at T gives the 16 largest their shares, and the others together theirs.

    Args:
        index: shape [B, 16].
        kept: their differences, shape [B, 16].
        tail: log m(T) at ``TAIL_TEMPERATURES``, shape [B, 4].
        classes: K.
        temperature: T > 0.

    Returns:
        The others are all equal, and never above the smallest of the 16.
    """
    others = classes - TOP_CLASSES
    level = temperature * (tail_log_mass(tail, others, temperature) - np.log(others))
    logits = np.empty((len(index), classes), np.float32)
    logits[:] = np.minimum(level, kept[:, -1])[:, None]
    np.put_along_axis(logits, index, kept, axis=1)
    return logits


def tail_log_mass(tail: Floats, others: int, temperature: float) -> NDArray[np.float64]:
    """Log m(T) at any T; shape [B].

    At one of ``TAIL_TEMPERATURES``, what was kept.  Between them, the polynomial through the five known points, held
    within what convexity allows.  Below T = 1, the straight line on from T = 2 and 1 or steeper, as the polynomial
    goes there, but no higher than the norm's bound, ``log m(T) <= log m(1) / T``.

    Args:
        tail: log m at ``TAIL_TEMPERATURES``, shape [B, 4].
        others: number of classes in the tail.
        temperature: T > 0.
    """
    known = np.concatenate([np.full((len(tail), 1), np.log(others)), tail[:, ::-1]], axis=1).astype(np.float64)
    beta = 1 / temperature
    at = np.flatnonzero(beta == _TAIL_BETAS)
    if len(at):
        return np.asarray(known[:, at[0]])
    slopes = np.diff(known, axis=1) / np.diff(_TAIL_BETAS)
    if beta > 1:
        lowest = known[:, -1] + (beta - 1) * slopes[:, -1]
        steepest = known[:, -1] + (beta - 1) * _slope_at_one(known)
        bound = np.maximum(beta * known[:, -1], lowest)
        return np.asarray(np.minimum(np.maximum(lowest, steepest), bound))
    right = int(np.searchsorted(_TAIL_BETAS, beta))
    left = right - 1
    lowest = np.full(len(tail), -np.inf)
    if left > 0:
        lowest = known[:, left] + (beta - _TAIL_BETAS[left]) * slopes[:, left - 1]
    if right < len(_TAIL_BETAS) - 1:
        lowest = np.maximum(lowest, known[:, right] + (beta - _TAIL_BETAS[right]) * slopes[:, right])
    highest = known[:, left] + (beta - _TAIL_BETAS[left]) * slopes[:, left]
    return np.asarray(np.minimum(np.maximum(_polynomial(known, beta), lowest), highest))


def _polynomial(known: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Lagrange's form."""
    weights = [
        np.prod([(beta - other) / (node - other) for other in _TAIL_BETAS if other != node])
        for node in _TAIL_BETAS.tolist()
    ]
    found: NDArray[np.float64] = known @ np.array(weights)
    return found


def _slope_at_one(known: NDArray[np.float64]) -> NDArray[np.float64]:
    """The parabola through the last three points, there."""
    (a, b), (b_, c) = itertools.pairwise(_TAIL_BETAS[-3:].tolist())
    assert b == b_
    first, last = (known[:, -2] - known[:, -3]) / (b - a), (known[:, -1] - known[:, -2]) / (c - b)
    found: NDArray[np.float64] = last + (last - first) * (c - b) / (c - a)
    return found


RecordKind = Literal["float16", "float32", "top16"]
RECORD_KINDS: tuple[RecordKind, ...] = ("float16", "float32", "top16")
FEW_CLASSES = 64  # with so many or fewer, all logits take little more room than the 16 largest


Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class RecordFormat:
    """How answers become bytes, and bytes answers.

    Args:
        kind: one of ``RECORD_KINDS``.
        classes: K >= 1; more than 64 for top16.
        embedding: D of the embedding that is kept too; 0: none.

    Raises:
        UsageError: another kind, or a size that does not fit it.

    Example:
        >>> record = RecordFormat("float16", classes=4)
        >>> record.nbytes
        8
        >>> kept = record.encode(np.array([[3.0, 1.0, 2.0, -1.0]], np.float32))
        >>> record.decode(kept)[0]
        array([[ 0., -2., -1., -4.]], dtype=float32)
    """

    kind: RecordKind
    classes: int
    embedding: int = 0

    def __post_init__(self) -> None:
        if self.kind not in RECORD_KINDS:
            raise UsageError(f"a record is one of {', '.join(RECORD_KINDS)}, got {self.kind!r}")
        if self.classes < 1 or self.embedding < 0:
            raise UsageError(f"a record needs classes >= 1 and an embedding >= 0: {self.classes}, {self.embedding}")
        if self.kind == "top16" and self.classes <= FEW_CLASSES:
            raise UsageError(f"top16 is for more than {FEW_CLASSES} classes, and there are {self.classes}: use float16")

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The fields of one record."""
        number = "<f4" if self.kind == "float32" else "<f2"
        fields = top16_fields(self.classes) if self.kind == "top16" else [("logits", number, self.classes)]
        if self.embedding:
            fields.append(("embedding", number, self.embedding))
        return np.dtype([(name, kind, (size,)) for name, kind, size in fields])

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return self.dtype.itemsize

    def encode(self, logits: Floats, embedding: Floats | None = None) -> Bytes:
        """Answers as records.

        Args:
            logits: shape [B, K].  In float16, differences beyond 65504 become 65504.
            embedding: shape [B, D]; None where none is kept.

        Returns:
            Shape [B, nbytes].
        """
        found = np.zeros(len(logits), self.dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are somebody else's to complain about
            if self.kind == "float32":
                found["logits"] = logits
            else:
                differences = logits - logits.max(axis=1, keepdims=True)
                if self.kind == "float16":
                    found["logits"] = to_float16(differences)
                else:
                    found["index"], kept, tail = encode_top16(differences)
                    found["logits"], found["tail"] = to_float16(kept), to_float16(tail)
            if self.embedding:
                assert embedding is not None  # whoever made the record said so
                found["embedding"] = embedding if self.kind == "float32" else to_float16(embedding)
        return found.view(np.uint8).reshape(len(logits), self.nbytes)

    def decode(self, records: Bytes, temperature: float | None = None) -> tuple[Floats, Floats | None]:
        """Records as answers.

        Args:
            records: shape [B, nbytes].
            temperature: T at which the logits will be softened; matters for top16 alone.  None: 1.

        Returns:
            Logits [B, K] up to a number added to all of an image's, but float32, which are as they were; and the
            embedding [B, D], or None.
        """
        found = self._fields(records)
        if self.kind == "top16":
            logits = decode_top16(
                found["index"].astype(np.int64),
                found["logits"].astype(np.float32),
                found["tail"].astype(np.float32),
                classes=self.classes,
                temperature=1.0 if temperature is None else temperature,
            )
        else:
            logits = found["logits"].astype(np.float32)
        return logits, found["embedding"].astype(np.float32) if self.embedding else None

    def finite(self, records: Bytes) -> NDArray[np.bool_]:
        """Which of the records hold finite numbers alone; shape [B]."""
        found = self._fields(records)
        every = [np.isfinite(found[name]).all(axis=1) for name in found.dtype.names or () if name != "index"]
        return np.asarray(np.logical_and.reduce(every), dtype=bool)

    def _fields(self, records: Bytes) -> NDArray[np.void]:
        return np.ascontiguousarray(records).view(self.dtype).reshape(len(records))


def to_float16(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Rounded to float16, with what would become infinite at its largest number."""
    limit = float(np.finfo(np.float16).max)
    found: NDArray[np.float16] = np.clip(values, -limit, limit).astype(np.float16)
    return found


FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
_OLDER_FORMAT = re.compile(rb'\{\s*"format": ([0-9]{1,9}),')
_REPAIR_HINT = "Remove it with `potstill cache rm {key}`; the next run records anew"


@dataclass(frozen=True)
class CacheManifest:
    """What a store is.

    Args:
        identity: all that decides the answers; plain JSON values.  Not the number of views: a store grows.
        record: how an answer is kept.
        samples: N, images of the split.
        facts: for people and for ``verify``; not part of the key.
    """

    identity: Mapping[str, Any]
    record: RecordFormat
    samples: int
    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """16 hex digits: the beginning of the SHA-256 of everything but the facts, as canonical JSON."""
        return hashlib.sha256(canonical_json(self._content()).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Make the store's folder with the manifest in it.

        The folder appears together with its manifest: a process that removes stores all the time never meets one that
        is half made.  A folder that is there already only gets the manifest.

        Raises:
            StorageError: it cannot be written.
        """
        content = {**self._content(), "key": self.key, "facts": dict(self.facts)}
        if folder.exists():
            write_checksummed_json(folder / MANIFEST_FILE, content)
            return
        new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
        try:
            write_checksummed_json(new / MANIFEST_FILE, content)
            with contextlib.suppress(FileExistsError):
                new.rename(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # else another process made the same store
                raise StorageError(f"cannot make {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> "CacheManifest":
        """What ``write`` wrote; not parsed before its SHA-256 is compared.

        Raises:
            ArtifactError: missing, damaged, of another format, or in a folder of another name than its key.
        """
        path, mending = folder / MANIFEST_FILE, _REPAIR_HINT.format(key=folder.name)
        try:
            value = read_checksummed_json(path)
        except ArtifactError as error:
            older = _OLDER_FORMAT.match(read_bytes(path))  # the first format carried its digest elsewhere
            if older is not None and 1 <= int(older[1]) < FORMAT_VERSION:
                raise ArtifactError(_format_mismatch(path, int(older[1]), mending)) from error
            raise ArtifactError(f"{error}. {mending}") from error
        damaged = f"{path} is damaged. {mending}"
        try:
            if value["format"] != FORMAT_VERSION and isinstance(value["format"], int):
                raise ArtifactError(_format_mismatch(path, value["format"], mending))
            record = RecordFormat(**{name: value["record"][name] for name in ("kind", "classes", "embedding")})
            found = cls(value["identity"], record, value["samples"], value["facts"])
            written = {name: value[name] for name in found._content()}
        except (ValueError, TypeError, KeyError, UsageError) as error:  # of a file that was made up to fit
            raise ArtifactError(damaged) from error
        plain = isinstance(found.identity, dict) and isinstance(found.facts, dict) and type(found.samples) is int
        if not plain or written != found._content() or found.key != folder.name or found.samples < 1:
            raise ArtifactError(damaged)
        return found

    def _content(self) -> dict[str, Any]:
        record = self.record
        return {
            "format": FORMAT_VERSION,
            "identity": self.identity,
            "samples": self.samples,
            "record": {
                "kind": record.kind,
                "classes": record.classes,
                "embedding": record.embedding,
                "nbytes": record.nbytes,
                "byte_order": "little",
            },
        }


def canonical_json(value: Any) -> str:
    """JSON that is the same for the same values: keys sorted, no spaces, ASCII alone.

    Raises:
        UsageError: values that JSON does not have.

    Example:
        >>> canonical_json({"b": (1, 2.0), "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a store is identified by plain JSON values: {error}") from error


def _format_mismatch(path: Path, found: int, mending: str) -> str:
    return f"{path} is of format {found}, and this version of potstill reads {FORMAT_VERSION}. {mending}"
