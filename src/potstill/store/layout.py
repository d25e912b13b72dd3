"""Where things stand in a store's two files, and how a block of records is checked.

``logits.bin``: [view][sample] records.  ``done.bin``: for each view and each block of 4096 of its records a mark: 4
bytes of checksum, then a bit for each record that is there.  No mark crosses a page, so a process that is killed leaves
the old one or the new one.  What is not marked is not read, and a mark that does not fit its records counts as none.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.store.manifest import Manifest

BLOCK = 4096  # records
PAGE = 4096  # bytes
_CHECK = 4  # bytes
_WORD = 0xFFFFFFFF

Bits = NDArray[np.uint8]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Of a store of N samples.

    Args:
        samples: N >= 1.
        nbytes: of one record.
        seed: of the checksums, so that no other store's files fit.
    """

    samples: int
    nbytes: int
    seed: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Layout":
        """The layout that a manifest asks for."""
        return cls(manifest.samples, manifest.record.nbytes, zlib.crc32(manifest.key.encode()))

    @property
    def blocks(self) -> int:
        """In a view."""
        return -(-self.samples // BLOCK)

    @property
    def width(self) -> int:
        """Bytes of a block's bits; fewer where there are few samples."""
        return -(-min(self.samples, BLOCK) // 8)

    @property
    def view_bytes(self) -> int:
        """Bytes of a view's records."""
        return self.samples * self.nbytes

    def ids_of(self, block: int) -> range:
        """The samples of a block."""
        return range(block * BLOCK, min(self.samples, (block + 1) * BLOCK))

    # marks

    def marks_at(self, view: int) -> NDArray[np.int64]:
        """Where a view's marks begin in done.bin, and where the last one ends: blocks + 1 places."""
        page, place = np.divmod(np.arange(self.blocks + 1, dtype=np.int64) + view * self.blocks, self._per_page)
        places: NDArray[np.int64] = page * PAGE + place * self._slot
        return places

    def views_in(self, size: int) -> int:
        """Views with a mark in a done.bin of so many bytes."""
        pages, rest = divmod(size, PAGE)
        marks = pages * self._per_page + min(self._per_page, -(-rest // self._slot))
        return -(-marks // self.blocks)

    def mark(self, check: int, bits: Bits) -> bytes:
        """A mark's bytes."""
        return check.to_bytes(_CHECK, "little") + bits.tobytes()

    def read_mark(self, block: int, mark: bytes) -> tuple[int, Bits] | None:
        """Checksum and bits of a mark; None where the bytes cannot be one.

        Args:
            block: whose mark it is.
            mark: all bytes up to the next mark; what is missing at the end of the file counts as zeros.
        """
        mark = mark.ljust(_CHECK + self.width, b"\0")
        bits = np.frombuffer(mark, np.uint8, self.width, _CHECK).copy()
        count = len(self.ids_of(block))
        beyond = np.unpackbits(bits, bitorder="little")[count:]
        if beyond.any() or any(mark[_CHECK + self.width :]):
            return None
        return int.from_bytes(mark[:_CHECK], "little"), bits

    @property
    def _per_page(self) -> int:
        return PAGE // (_CHECK + self.width)

    @property
    def _slot(self) -> int:
        return PAGE // self._per_page

    # checksums

    def checks(self, view: int, ids: Iterable[int], records: bytes | memoryview) -> list[int]:
        """A CRC-32 for each record, of its bytes and of its place.

        A block's checksum is their sum modulo 2**32: it grows record by record in any order, and each changed bit
        changes it.

        Args:
            view: which.
            ids: of the samples.
            records: their bytes, one after the other.
        """
        size, start = self.nbytes, self.seed + view * self.samples
        return [
            zlib.crc32(records[at * size : (at + 1) * size], (start + sample) & _WORD) for at, sample in enumerate(ids)
        ]


def total(checks: Iterable[int], before: int = 0) -> int:
    """The sum of checksums modulo 2**32.

    Example:
        >>> total([0xFFFFFFFF, 2])
        1
    """
    return (sum(checks) + before) & _WORD


def is_set(bits: Bits, ids: Ids) -> NDArray[np.bool_]:
    """Which bits are set; ``bits`` is one-dimensional."""
    found: NDArray[np.bool_] = (bits[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1 == 1
    return found
