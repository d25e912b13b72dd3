"""A file of records, with a checksum for each in a second file; records of one size, or of any size with an index.

A record exists once its checksum does.  Checksums are written after the records are on the disk, and compared before
records are used, so whatever ends the process, no incomplete or damaged record is taken for a whole one.

Files are written by ``pwrite`` and read through a memory map: on a full disk, writing through a memory map would end
the process (SIGBUS) instead of raising an error.
"""

import binascii
import errno
import itertools
import mmap
import os
import weakref
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.io import sync_folder

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_ALLOCATION_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_CHUNK = 1 << 20  # bytes, approximately, that are read or written at a time
_UINT32_MAX = 0xFFFFFFFF

Numbers = NDArray[np.int64]
Checksums = NDArray[np.uint32]


class RecordFile:
    """Open handles of both files; missing ones are created empty.

    ``records``: record after record.  ``checksums``: a CRC-32 of 4 bytes or a CRC-16 of 2 for each, of its bytes, its
    number and ``seed``; 0 where there is no record.

    ``nbytes`` are those of one record, ``size`` of all if the last one is shorter, ``width`` of a checksum: 2 misses
    one in 65,536 damaged records, and none of up to 4,095 bytes in which one or two bits have changed.  ``seed`` keeps
    checksums of other files from matching.  Without ``write``, existing files are opened for reading.  All methods
    raise OSError.
    """

    def __init__(
        self,
        records: Path,
        checksums: Path,
        nbytes: int,
        seed: int,
        *,
        size: int | None = None,
        width: Literal[2, 4] = 4,
        write: bool = True,
    ) -> None:
        self.folder, self.nbytes, self.seed, self.size, self.writable = records.parent, nbytes, seed, size, write
        self.width, self.dtype = width, np.dtype(f"<u{width}")
        self.records = self._open(records)
        try:
            self.checksums = self._open(checksums)
        except OSError:
            os.close(self.records)
            raise
        self._release = weakref.finalize(self, _close_all, self.records, self.checksums)
        self._folder_synced = False  # whether the folder's entries of both files are on the disk
        self._map: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both handles.  May be called twice."""
        self._map = np.empty(0, np.uint8)
        self._release()

    def _open(self, path: Path) -> int:
        if self.writable:
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                self.writable = False
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_checksums(self, first: int, end: int) -> Checksums:
        """Return the checksums of the records from ``first`` to before ``end``; 0: there is no record."""
        content = _pread(self.checksums, self.width * first, self.width * (end - first))
        found = np.zeros(end - first, np.uint32)
        count = len(content) // self.width
        found[:count] = np.frombuffer(content, self.dtype, count)
        return found

    def count(self) -> int:
        """Return the number of the last record with a checksum, plus one."""
        return os.fstat(self.checksums).st_size // self.width

    def changed_at(self) -> int:
        """Return the checksums' modification time in ns, which changes when any process writes them."""
        return os.fstat(self.checksums).st_mtime_ns

    def checksum(self, number: int, record: bytes | memoryview) -> int:
        """Return the checksum of a record's bytes."""
        start = (self.seed + number) & _UINT32_MAX
        if self.width == 4:
            return zlib.crc32(record, start) or 1
        # Both halves count: record n + 65,536 has another start.
        return binascii.crc_hqx(record, (start >> 16) ^ (start & 0xFFFF)) or 1

    def intact(self, numbers: Numbers, checksums: Checksums) -> NDArray[np.bool_]:
        """Return which records [B], ascending, have these checksums; not mapped, so that I/O errors are raised."""
        matches = np.zeros(len(numbers), bool)
        chunks = numbers // max(1, _CHUNK // self.nbytes)
        starts = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(numbers)]
        for start, stop in itertools.pairwise(starts if len(numbers) else ()):
            chunk = numbers[start:stop].tolist()
            first = chunk[0] * self.nbytes
            content = memoryview(_pread(self.records, first, self._offset(chunk[-1] + 1) - first))
            places = [each * self.nbytes - first for each in chunk]
            found = [self.checksum(n, content[at : at + self.nbytes]) for n, at in zip(chunk, places, strict=True)]
            matches[start:stop] = found == checksums[start:stop]
        return matches

    def write(self, first: int, records: memoryview) -> None:
        """Write consecutive records, which exist once they are marked."""
        pwrite(self.records, first * self.nbytes, records)

    def mark(self, numbers: Numbers, checksums: Checksums) -> None:
        """Sync the written records [B], ascending, to the disk, then write and sync their checksums."""
        os.fsync(self.records)
        content = memoryview(checksums.astype(self.dtype).tobytes())
        for start, stop in consecutive(numbers):
            pwrite(self.checksums, self.width * int(numbers[start]), content[self.width * start : self.width * stop])
        os.fsync(self.checksums)
        if not self._folder_synced:
            sync_folder(self.folder)
            self._folder_synced = True

    def reserve(self, first: int, end: int) -> None:
        """Allocate disk space for records, undone if there is not enough; a hole before them is filled as it is
        written.
        """
        before = os.fstat(self.records).st_size
        if self.size is not None and before > self.size:
            os.ftruncate(self.records, self.size)
        start, stop = max(before, self._offset(first)), self._offset(end)
        if start >= stop:
            return
        try:
            _allocate(self.records, start, stop - start)
        except OSError:
            os.ftruncate(self.records, before)
            raise

    def mapped(self, first: int, end: int) -> NDArray[np.uint8]:
        """Return the bytes of records, as far as the file goes, in a read-only memory map, which outlives ``close``."""
        if len(self._map) < self._offset(end):
            length = os.fstat(self.records).st_size
            if length:
                # Not copy-on-write, for which the system may reserve memory.
                self._map = np.frombuffer(mmap.mmap(self.records, length, access=mmap.ACCESS_READ), np.uint8)
        return self._map[self._offset(first) : self._offset(end)]

    def _offset(self, number: int) -> int:
        """Return where a record starts, or the end of the last one."""
        return number * self.nbytes if self.size is None else min(number * self.nbytes, self.size)


_INDEX_ROW = np.dtype([("at", "<u8"), ("bytes", "<u4"), ("checksum", "<u4")])


class IndexedRecords:
    """Open handles of a file of records of any size and of its index; missing ones are created empty.

    The index has offset, bytes and CRC-32 of each record, of its bytes, its number and ``seed``; 0 bytes where there
    is no record.  ``write`` appends; one process may write at a time, and any number may read.

    Args:
        records: path of the records.
        index: path of their index.
        count: N, of the records when all exist.
        seed: of the checksums, so that those of another file do not match.
        write: if False, existing files are opened for reading.

    Raises:
        OSError: from the constructor and from all methods.
    """

    def __init__(self, records: Path, index: Path, count: int, seed: int, *, write: bool = False) -> None:
        self._arguments, self.folder, self.seed = (records, index, count, seed), records.parent, seed
        flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
        self.records = os.open(records, flags | os.O_CLOEXEC, 0o666)
        try:
            self.index = os.open(index, flags | os.O_CLOEXEC, 0o666)
        except OSError:
            os.close(self.records)
            raise
        self._release = weakref.finalize(self, _close_all, self.records, self.index)
        self.rows = np.zeros(count, _INDEX_ROW)
        content = _pread(self.index, 0, self.rows.nbytes)
        known = len(content) // _INDEX_ROW.itemsize
        self.rows[:known] = np.frombuffer(content, _INDEX_ROW, known)
        self._end = self.nbytes
        self._unmarked: list[int] = []

    def __reduce__(self) -> tuple[type["IndexedRecords"], tuple[Path, Path, int, int]]:
        return IndexedRecords, self._arguments  # another process opens the files for reading

    def close(self) -> None:
        """Close both handles.  May be called twice."""
        self._release()

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Which records are in the index, [N]."""
        present: NDArray[np.bool_] = self.rows["bytes"] > 0
        return present

    @property
    def nbytes(self) -> int:
        """Bytes from the beginning of the file to the end of the last record of the index."""
        return int((self.rows["at"] + self.rows["bytes"]).max(initial=0))

    def read(self, number: int) -> bytes | None:
        """Return a record; None if there is none, or if it does not match its checksum."""
        at, length, checksum = self.rows[number].tolist()
        content = _pread(self.records, at, length)
        return content if length and len(content) == length and self._checksum(number, content) == checksum else None

    def write(self, number: int, record: bytes) -> None:
        """Append a record, which exists once it is marked."""
        pwrite(self.records, self._end, memoryview(record))
        self.rows[number] = (self._end, len(record), self._checksum(number, record))
        self._end += len(record)
        self._unmarked.append(number)

    def mark(self) -> None:
        """Sync the written records to the disk, then write and sync their rows of the index."""
        os.fsync(self.records)
        numbers = np.array(sorted(self._unmarked), np.int64)
        for start, stop in consecutive(numbers):
            first, end = int(numbers[start]), int(numbers[stop - 1]) + 1
            pwrite(self.index, first * _INDEX_ROW.itemsize, memoryview(self.rows[first:end].tobytes()))
        os.fsync(self.index)
        sync_folder(self.folder)
        self._unmarked = []

    def _checksum(self, number: int, record: bytes) -> int:
        return zlib.crc32(record, (self.seed + number) & _UINT32_MAX)


def consecutive(numbers: Numbers) -> list[tuple[int, int]]:
    """Return start and stop of each run of consecutive numbers; ``numbers`` are ascending.

    Example:
        >>> consecutive(np.array([3, 4, 5, 9]))
        [(0, 3), (3, 4)]
    """
    ends = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    return list(zip([0, *ends[:-1]], ends, strict=True)) if len(numbers) else []


def _allocate(handle: int, start: int, length: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, start, length)
            return
        except OSError as error:
            if error.errno not in _ALLOCATION_UNSUPPORTED:
                raise
    for at in range(start, start + length, _CHUNK):
        pwrite(handle, at, memoryview(bytes(min(_CHUNK, start + length - at))))


def _pread(handle: int, at: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(handle, length, at)):
        parts.append(part)
        at, length = at + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def pwrite(handle: int, at: int, data: memoryview) -> None:
    """Write all bytes at this offset."""
    while len(data):
        count = os.pwrite(handle, data, at)
        at, data = at + count, data[count:]


def _close_all(*handles: int) -> None:
    for handle in handles:
        os.close(handle)
