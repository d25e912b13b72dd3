"""What one process knows of one view: which records are there, checked once, and what it has added since."""

import time

import numpy as np
from numpy.typing import NDArray

from potstill.store.files import Files
from potstill.store.layout import BLOCK, Ids, Layout, is_set, total

_TICK = 50_000_000  # ns
_ONES = np.array([value.bit_count() for value in range(256)], np.uint8)


class Marks:
    """The marks of a view; about a fifth of a byte of memory a record.

    Args:
        layout: of the store.
        files: of the store.
        view: which.

    Raises:
        OSError: as the system says it; of all methods too.
    """

    def __init__(self, layout: Layout, files: Files, view: int) -> None:
        self.layout, self.files, self.view = layout, files, view
        self.mine: set[int] = set()  # blocks that nobody else writes
        self.dirty: set[int] = set()  # blocks with records that are not marked in the file yet
        self.damaged: set[int] = set()  # blocks whose marks do not fit their records
        self._bits = np.zeros((layout.blocks, layout.width), np.uint8)
        self._flat = self._bits.reshape(-1)
        self._checks = [0] * layout.blocks
        self._seen = [b""] * layout.blocks  # marks as they were found in the file
        self._changed = -1
        self.refresh()

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """Which records are there; shape [B]."""
        return is_set(self._flat, ids)

    @property
    def count(self) -> int:
        """How many records are there."""
        return int(_ONES[self._flat].sum(dtype=np.int64))

    def refresh(self) -> None:
        """Look at what other processes have marked since."""
        changed = self.files.marks_changed()
        if changed == self._changed:
            return
        # A file may change twice within one tick of its clock.
        self._changed = changed if time.time_ns() - changed > _TICK else -1
        for block, mark in enumerate(self.files.read_marks(self.view)):
            if block not in self.mine and mark != self._seen[block]:
                self._take(block, mark)

    def own(self, block: int) -> None:
        """Nobody else writes this block from now on."""
        if block not in self.mine:
            mark = self.files.read_marks(self.view, block, block + 1)[0]
            if mark != self._seen[block]:
                self._take(block, mark)
            self.mine.add(block)

    def add(self, ids: Ids, records: memoryview) -> None:
        """Note records that have been written.

        Args:
            ids: of samples in blocks that are ``mine``; all different, and none of them there before.
            records: their bytes.
        """
        samples = ids.tolist()
        for sample, check in zip(samples, self.layout.checks(self.view, samples, records), strict=True):
            block = sample // BLOCK
            self._checks[block] = total((check,), self._checks[block])
            self.dirty.add(block)
        np.bitwise_or.at(self._flat, ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8))

    def write(self) -> None:
        """Mark in the file what has been added; the records must be on the disk before."""
        for block in sorted(self.dirty):
            self.files.write_mark(self.view, block, self.layout.mark(self._checks[block], self._bits[block]))
        self.damaged -= self.dirty
        self.dirty.clear()

    def _take(self, block: int, mark: bytes) -> None:
        """Believe a mark if it fits the records."""
        self._seen[block] = mark
        self._bits[block], self._checks[block] = 0, 0
        self.damaged.discard(block)
        found = self.layout.read_mark(block, mark)
        if found is None:
            self.damaged.add(block)
            return
        check, bits = found
        if not bits.any() and not check:
            return
        if check != self._checked(block, bits):
            self.damaged.add(block)
            return
        self._bits[block], self._checks[block] = bits, check

    def _checked(self, block: int, bits: NDArray[np.uint8]) -> int | None:
        """The checksum of the marked records as they are; None where the file ends before them."""
        places = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        size = self.layout.nbytes
        records = np.frombuffer(self.files.read_block(self.view, block), np.uint8)
        records = records[: len(records) // size * size].reshape(-1, size)
        if not len(places):
            return 0
        if places[-1] >= len(records):
            return None
        there = records[places].reshape(-1).data
        return total(self.layout.checks(self.view, (places + block * BLOCK).tolist(), there))
