"""What is kept of a teacher's answer to one view of one image: a record of a fixed number of bytes.  No torch here.

Kinds:

- ``float16``: differences of logits, ``z - max z``, so that the temperature stays free; 2 bytes a class.
- ``float32``: the logits' own bits; 4 bytes a class.
- ``top16``, for more than 64 classes: the 16 largest and the mass of the others; 72 bytes (see ``largest``).

An embedding follows where a method reads one, as float32 beside float32 logits and as float16 otherwise.
All numbers are little-endian.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.errors import UsageError
from potstill.store import largest

Kind = Literal["float16", "float32", "top16"]
KINDS: tuple[Kind, ...] = ("float16", "float32", "top16")
FEW_CLASSES = 64  # with so many or fewer, all logits take little more room than the 16 largest

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Record:
    """How answers become bytes, and bytes answers.

    Args:
        kind: one of ``KINDS``.
        classes: K >= 1; more than 64 for top16.
        embedding: D of the embedding that is kept too; 0: none.

    Raises:
        UsageError: another kind, or a size that does not fit it.

    Example:
        >>> record = Record("float16", classes=4)
        >>> record.nbytes
        8
        >>> kept = record.encode(np.array([[3.0, 1.0, 2.0, -1.0]], np.float32))
        >>> record.decode(kept)[0]
        array([[ 0., -2., -1., -4.]], dtype=float32)
    """

    kind: Kind
    classes: int
    embedding: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a record is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.classes < 1 or self.embedding < 0:
            raise UsageError(f"a record needs classes >= 1 and an embedding >= 0: {self.classes}, {self.embedding}")
        if self.kind == "top16" and self.classes <= FEW_CLASSES:
            raise UsageError(f"top16 is for more than {FEW_CLASSES} classes, and there are {self.classes}: use float16")

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The fields of one record."""
        number = "<f4" if self.kind == "float32" else "<f2"
        fields = largest.fields(self.classes) if self.kind == "top16" else [("logits", number, self.classes)]
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
                    found["index"], kept, tail = largest.split(differences)
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
            logits = largest.join(
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
