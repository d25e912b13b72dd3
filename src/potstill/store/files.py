"""A store's two files: written by calls that report a full disk, read through a memory map.

Writing through a memory map would be shorter, but a full disk then ends the process (SIGBUS) instead of being reported.
"""

import contextlib
import errno
import itertools
import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.store.claims import READ_ONLY
from potstill.store.layout import Layout

RECORDS, MARKS = "logits.bin", "done.bin"
_CHUNK = 1 << 20
_NO_RESERVING = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Files:
    """Open handles of both files; created empty where they are missing.

    Args:
        folder: the store's.
        layout: of the store.
        write: False: they are opened to be read, and must be there.

    Raises:
        OSError: as the system says it; of all methods too.
    """

    def __init__(self, folder: Path, layout: Layout, *, write: bool = True) -> None:
        self.folder, self.layout, self.writable = folder, layout, write
        self._records = self._open(folder / RECORDS)
        try:
            self._marks = self._open(folder / MARKS)
        except OSError:
            os.close(self._records)
            raise
        self._release = weakref.finalize(self, _close, self._records, self._marks)
        self._entered = False  # both files in their folder, for certain
        self._map: NDArray[np.uint8] = np.empty(0, np.uint8)

    def _open(self, path: Path) -> int:
        if self.writable:
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                self.writable = False
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give both handles back.  May be called twice."""
        self._map = np.empty(0, np.uint8)
        self._release()

    # records

    def slab(self, view: int) -> NDArray[np.uint8]:
        """A view's records as they are in the file, [N, nbytes], or fewer where it ends before; not to be written."""
        start, size = view * self.layout.view_bytes, self.layout.view_bytes
        if len(self._map) < start + size:
            length = os.fstat(self._records).st_size
            if length:
                self._map = np.frombuffer(mmap.mmap(self._records, length, prot=mmap.PROT_READ), np.uint8)
        found = self._map[start : start + size]
        rows = len(found) // self.layout.nbytes
        return found[: rows * self.layout.nbytes].reshape(rows, self.layout.nbytes)

    def read_block(self, view: int, block: int) -> bytes:
        """A block's records; fewer where the file ends before.  A call, not the map: an I/O error is an error then."""
        ids = self.layout.ids_of(block)
        size = self.layout.nbytes
        return _read(self._records, view * self.layout.view_bytes + ids.start * size, len(ids) * size)

    def write_records(self, view: int, first: int, records: memoryview) -> None:
        """Put records at ``first`` and the following places."""
        _write(self._records, view * self.layout.view_bytes + first * self.layout.nbytes, records)

    def reserve(self, view: int, alone: Callable[[], AbstractContextManager[None]]) -> None:
        """Let the file reach to the end of a view, with room on the disk; given back where there is not enough.

        A view that lies before the end, and that nobody has written to, may be a hole; it fills as it is written.

        Args:
            view: which.
            alone: within it no other process reserves, so that nobody's records are replaced by zeros.
        """
        end = (view + 1) * self.layout.view_bytes
        if os.fstat(self._records).st_size >= end:
            return
        with alone():
            before = os.fstat(self._records).st_size
            start = max(before, view * self.layout.view_bytes)
            if start >= end:
                return
            try:
                _allocate(self._records, start, end - start)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._records, before)
                raise

    def sync_records(self) -> None:
        """Wait until the records are on the disk."""
        os.fsync(self._records)

    # marks

    def views(self) -> int:
        """Views of which something is marked."""
        return self.layout.views_in(os.fstat(self._marks).st_size)

    def marks_changed(self) -> int:
        """A number that changes when marks are written, by whomsoever."""
        return os.fstat(self._marks).st_mtime_ns

    def read_marks(self, view: int, first: int = 0, end: int | None = None) -> list[bytes]:
        """Marks of a view's blocks from ``first`` on, each with all bytes up to the next one."""
        places = self.layout.marks_at(view)[first : None if end is None else end + 1].tolist()
        text = _read(self._marks, places[0], places[-1] - places[0])
        return [text[at - places[0] : to - places[0]] for at, to in itertools.pairwise(places)]

    def write_mark(self, view: int, block: int, mark: bytes) -> None:
        """Replace a mark, and all bytes up to the next one."""
        at, end = self.layout.marks_at(view)[block : block + 2].tolist()
        _write(self._marks, at, memoryview(mark.ljust(end - at, b"\0")))

    def sync_marks(self) -> None:
        """Wait until the marks are on the disk, and both files in their folder."""
        os.fsync(self._marks)
        if not self._entered:
            handle = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            self._entered = True


def _allocate(handle: int, start: int, length: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, start, length)
            return
        except OSError as error:
            if error.errno not in _NO_RESERVING:
                raise
    for at in range(start, start + length, _CHUNK):
        _write(handle, at, memoryview(bytes(min(_CHUNK, start + length - at))))


def _read(handle: int, at: int, length: int) -> bytes:
    """Up to the end of the file."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(handle, length, at)):
        parts.append(part)
        at, length = at + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(handle: int, at: int, data: memoryview) -> None:
    while len(data):
        count = os.pwrite(handle, data, at)
        at, data = at + count, data[count:]


def _close(*handles: int) -> None:
    for handle in handles:
        os.close(handle)
