r"""Encode the teacher's output for one view of one image as a record of a fixed number of bytes; the manifest that
identifies a cache's records.  No torch here.

Kinds of records:

- ``float16``: differences of logits, ``z - max z``, valid for any temperature; 2 bytes a class.
- ``float32``: the logits, unchanged; 4 bytes a class.
- ``top16``, for more than 64 classes: the 16 largest logits and the mass of the others; 72 bytes.

An embedding follows if the method reads one, as float32 beside float32 logits and as float16 otherwise.
All numbers are little-endian.

``top16``: with :math:`d_i = z_i - \max z` and the tail all classes but the 16 largest, the tail's mass is
:math:`m(T) = \sum_{tail} e^{d_i / T}`.  Its logarithm as a function of :math:`\beta = 1 / T` is convex, is known
exactly at :math:`\beta = 0` (the logarithm of the number of classes in the tail), and is stored at T = 8, 4, 2 and 1.

The key of a cache is a digest of its manifest, so outdated records are never found.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ArtifactError, StorageError, UsageError
from potstill.io import read_checksummed_json, write_checksummed_json

TOP_CLASSES = 16
TAIL_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
_TAIL_BETAS = np.array([0.0, *(1 / t for t in reversed(TAIL_TEMPERATURES))])  # beta, ascending

Floats = NDArray[np.float32]


def top16_fields(classes: int) -> list[tuple[str, str, int]]:
    """Return name, dtype and size of each field of a record."""
    return [
        ("index", "<u2" if classes <= 1 << 16 else "<u4", TOP_CLASSES),
        ("logits", "<f2", TOP_CLASSES),
        ("tail", "<f2", 4),
    ]


def encode_top16(differences: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Encode ``z - max z`` [B, K]: the classes of the 16 largest, in order, their values, and the tail's log m(T)."""
    top = np.argpartition(-differences, TOP_CLASSES - 1, axis=1)[:, :TOP_CLASSES]
    others = differences.copy()
    np.put_along_axis(others, top, -np.inf, axis=1)
    # Of equal logits, the lower class: which of several 16th largest a partition keeps depends on NumPy and the CPU.
    tied = others.max(axis=1) == np.take_along_axis(differences, top, axis=1).min(axis=1)
    if tied.any():
        top[tied] = np.argsort(-differences[tied], axis=1, kind="stable")[:, :TOP_CLASSES]
        others[tied] = differences[tied]
        np.put_along_axis(others, top, -np.inf, axis=1)
    order = np.lexsort((top, -np.take_along_axis(differences, top, axis=1)), axis=1)
    top = np.take_along_axis(top, order, axis=1)
    largest = np.take_along_axis(differences, top, axis=1)
    highest = others.max(axis=1, keepdims=True)
    power = np.exp((others - highest) / TAIL_TEMPERATURES[-1])
    masses = []
    for temperature in reversed(TAIL_TEMPERATURES):  # halving the temperature squares each power
        masses.append(np.log(power.sum(axis=1)) + highest[:, 0] / temperature)
        power *= power
    return top, largest, np.stack(masses[::-1], axis=1)


def decode_top16(
    index: NDArray[np.int64], largest: Floats, tail: Floats, *, classes: int, temperature: float
) -> Floats:
    """Return logits [B, K] whose softmax at T has the probabilities of the 16 largest, and the tail's as a whole.

    ``index`` and ``largest`` are [B, 16], ``tail`` [B, 4].  The logits of the tail are equal, and not above the 16.
    """
    others = classes - TOP_CLASSES
    level = temperature * (tail_log_mass(tail, others, temperature) - np.log(others))
    logits = np.empty((len(index), classes), np.float32)
    logits[:] = np.minimum(level, largest[:, -1])[:, None]
    np.put_along_axis(logits, index, largest, axis=1)
    return logits


def tail_log_mass(tail: Floats, others: int, temperature: float) -> NDArray[np.float64]:
    """Return log m(T) at any T; shape [B].

    At one of ``TAIL_TEMPERATURES``, the stored value.  Between them, the polynomial through the five points, clipped to
    the bounds of convexity.  Below T = 1, the line through T = 2 and 1, or the polynomial's slope if steeper, but not
    above the bound ``log m(T) <= log m(1) / T``.
    """
    points = np.concatenate([np.full((len(tail), 1), np.log(others)), tail[:, ::-1]], axis=1).astype(np.float64)
    beta = 1 / temperature
    at = np.flatnonzero(beta == _TAIL_BETAS)
    if len(at):
        return np.asarray(points[:, at[0]])
    slopes = np.diff(points, axis=1) / np.diff(_TAIL_BETAS)
    if beta > 1:
        lowest = points[:, -1] + (beta - 1) * slopes[:, -1]
        steepest = points[:, -1] + (beta - 1) * _slope_at_one(points)
        bound = np.maximum(beta * points[:, -1], lowest)
        return np.asarray(np.minimum(np.maximum(lowest, steepest), bound))
    right = int(np.searchsorted(_TAIL_BETAS, beta))
    left = right - 1
    lowest = np.full(len(tail), -np.inf)
    if left > 0:
        lowest = points[:, left] + (beta - _TAIL_BETAS[left]) * slopes[:, left - 1]
    if right < len(_TAIL_BETAS) - 1:
        lowest = np.maximum(lowest, points[:, right] + (beta - _TAIL_BETAS[right]) * slopes[:, right])
    highest = points[:, left] + (beta - _TAIL_BETAS[left]) * slopes[:, left]
    return np.asarray(np.minimum(np.maximum(_polynomial(points, beta), lowest), highest))


def _polynomial(points: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Evaluate the interpolating polynomial, in Lagrange's form."""
    weights = [
        np.prod([(beta - other) / (node - other) for other in _TAIL_BETAS if other != node])
        for node in _TAIL_BETAS.tolist()
    ]
    value: NDArray[np.float64] = points @ np.array(weights)
    return value


def _slope_at_one(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the slope at beta = 1 of the parabola through the last three points."""
    (a, b), (b_, c) = itertools.pairwise(_TAIL_BETAS[-3:].tolist())
    assert b == b_
    first, last = (points[:, -2] - points[:, -3]) / (b - a), (points[:, -1] - points[:, -2]) / (c - b)
    slope: NDArray[np.float64] = last + (last - first) * (c - b) / (c - a)
    return slope


RecordKind = Literal["float16", "float32", "top16"]
RECORD_KINDS: tuple[RecordKind, ...] = ("float16", "float32", "top16")
FEW_CLASSES = 64  # up to this number, all logits take little more space than the 16 largest


Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class RecordFormat:
    """Encoding of teacher outputs as bytes.

    ``classes`` K, 0: no logits; ``embedding`` D, 0: none.

    Example:
        >>> record = RecordFormat("float16", classes=4)
        >>> record.nbytes
        8
        >>> records = record.encode(np.array([[3.0, 1.0, 2.0, -1.0]], np.float32))
        >>> record.decode(records)[0]
        array([[ 0., -2., -1., -4.]], dtype=float32)
    """

    kind: RecordKind
    classes: int
    embedding: int = 0

    def __post_init__(self) -> None:
        if self.kind not in RECORD_KINDS:
            raise UsageError(f"the kind of a record is one of {', '.join(RECORD_KINDS)}, got {self.kind!r}")
        if min(self.classes, self.embedding) < 0 or self.classes + self.embedding == 0:
            raise UsageError(
                f"a record needs classes >= 0 and embedding >= 0, not both 0: {self.classes}, {self.embedding}"
            )
        if self.classes == 0 and self.kind != "float32":
            raise UsageError(f"a record without logits is of kind float32, got {self.kind}")
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
        """Encode logits [B, K], in float16 clipped to 65504, and embedding [B, D] as records [B, nbytes]."""
        records = np.zeros(len(logits), self.dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller checks for NaN and infinity
            if self.kind == "float32":
                records["logits"] = logits
            else:
                differences = logits - logits.max(axis=1, keepdims=True)
                if self.kind == "float16":
                    records["logits"] = to_float16(differences)
                else:
                    records["index"], largest, tail = encode_top16(differences)
                    records["logits"], records["tail"] = to_float16(largest), to_float16(tail)
            if self.embedding:
                assert embedding is not None  # the record has one
                records["embedding"] = embedding if self.kind == "float32" else to_float16(embedding)
        return records.view(np.uint8).reshape(len(logits), self.nbytes)

    def decode(self, records: Bytes, temperature: float | None = None) -> tuple[Floats, Floats | None]:
        """Return logits [B, K], exact for float32, else up to a constant for each image; and embedding [B, D]."""
        fields = self._fields(records)
        if self.kind == "top16":
            logits = decode_top16(
                fields["index"].astype(np.int64),
                fields["logits"].astype(np.float32),
                fields["tail"].astype(np.float32),
                classes=self.classes,
                temperature=1.0 if temperature is None else temperature,
            )
        else:
            logits = fields["logits"].astype(np.float32)
        return logits, fields["embedding"].astype(np.float32) if self.embedding else None

    def finite(self, records: Bytes) -> NDArray[np.bool_]:
        """Return which records hold only finite numbers; shape [B]."""
        fields = self._fields(records)
        finite = [np.isfinite(fields[name]).all(axis=1) for name in fields.dtype.names or () if name != "index"]
        return np.asarray(np.logical_and.reduce(finite), dtype=bool)

    def _fields(self, records: Bytes) -> NDArray[np.void]:
        return np.ascontiguousarray(records).view(self.dtype).reshape(len(records))


def to_float16(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Round to float16, clipped to its range."""
    limit = float(np.finfo(np.float16).max)
    rounded: NDArray[np.float16] = np.clip(values, -limit, limit).astype(np.float16)
    return rounded


FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
_REPAIR_HINT = "Remove it with `potstill cache rm {key}`; the next run fills it anew"


@dataclass(frozen=True)
class CacheManifest:
    """Identity and format of a cache."""

    identity: Mapping[str, Any]  # JSON values that determine the outputs, but not the number of views, which may grow
    record: RecordFormat
    samples: int  # N, images of the split
    facts: Mapping[str, Any]  # for listings and ``verify``; not part of the key

    @property
    def key(self) -> str:
        """The first 16 hex digits of the SHA-256 of everything but the facts, as canonical JSON."""
        return hashlib.sha256(canonical_json(self._content()).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Create the cache's folder, renamed into place with its manifest; an existing one gets the manifest."""
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
            if error.errno != errno.ENOTEMPTY:  # else another process created the same cache
                raise StorageError(f"cannot create {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> "CacheManifest":
        """Read the manifest; its SHA-256 is compared before it is parsed."""
        path, hint = folder / MANIFEST_FILE, _REPAIR_HINT.format(key=folder.name)
        try:
            value = read_checksummed_json(path)
        except ArtifactError as error:
            raise ArtifactError(f"{error}. {hint}") from error
        damaged = f"{path} is damaged. {hint}"
        try:
            if value["format"] != FORMAT_VERSION and isinstance(value["format"], int):
                version = f"format {value['format']}, and this version of potstill reads {FORMAT_VERSION}"
                raise ArtifactError(f"{path} is of {version}. {hint}")
            record = RecordFormat(**{name: value["record"][name] for name in ("kind", "classes", "embedding")})
            found = cls(value["identity"], record, value["samples"], value["facts"])
            written = {name: value[name] for name in found._content()}
        except (ValueError, TypeError, KeyError, UsageError) as error:  # a forged file with a valid digest
            raise ArtifactError(damaged) from error
        valid_types = isinstance(found.identity, dict) and isinstance(found.facts, dict) and type(found.samples) is int
        if not valid_types or written != found._content() or found.key != folder.name or found.samples < 1:
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
    """Return JSON with sorted keys, without spaces, in ASCII: equal for equal values.

    Example:
        >>> canonical_json({"b": (1, 2.0), "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the identity of a teacher cache must be JSON values: {error}") from error
