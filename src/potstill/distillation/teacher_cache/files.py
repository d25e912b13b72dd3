"""The files of a cache: their layout and checksums, reading and writing, and the locks on blocks.

``logits.bin``: [view][sample] records.  ``done.bin``: for each view and each block of 4096 of its records a mark: 4
bytes of checksum, then a bit for each record that is there.  No mark crosses a page, so a process that is killed leaves
the old one or the new one.  What is not marked is not read, and a mark that does not fit its records counts as none.

Files are written by calls that report a full disk, and read through a memory map: writing through a memory map would be
shorter, but a full disk then ends the process (SIGBUS) instead of being reported.

Locks are byte ranges of one file, between processes and within one.  They are the system's (POSIX): they end with the
process, however it ends.  But they are held by processes, not by objects, and closing any handle of the file drops them
all; so one process has one handle for each file.
"""

import contextlib
import errno
import itertools
import mmap
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.distillation.teacher_cache.record_format import CacheManifest
from potstill.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "lock"
_GROWTH_BYTE = 1 << 60  # bytes that no block has
_USE_BYTE = _GROWTH_BYTE + 1
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_LOCK_DENIED = (errno.EAGAIN, errno.EACCES)

_open_locks: dict[tuple[int, int], "_LockFile"] = {}  # (device, inode) -> this process's handle
_guard = threading.RLock()


class _LockFile:
    """The one handle that this process has of a lock file."""

    def __init__(self, identity: tuple[int, int], handle: int) -> None:
        self.identity, self.handle, self.process = identity, handle, os.getpid()
        self.users = 0
        # A store that was forgotten, not closed, holds nothing any more.
        self.owners: weakref.WeakValueDictionary[int, BlockLocks] = weakref.WeakValueDictionary()

    def lock(self, at: int, *, shared: bool = False, wait: bool = False) -> bool:
        flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self.handle, flags, 1, at)
        except OSError as error:
            if error.errno in _LOCK_DENIED and not wait:
                return False
            raise
        return True

    def unlock(self, at: int) -> None:
        fcntl.lockf(self.handle, fcntl.LOCK_UN, 1, at)


class BlockLocks:
    """One store's claims.

    Args:
        folder: the store's; has or gets a file ``lock``.

    Raises:
        StorageError: no such locks here.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            raise StorageError("stores of teacher outputs need byte-range locks, which this system does not have")
        self.path = folder / LOCK_FILE
        try:
            self._file = _acquire_lock_file(self.path)
        except OSError as error:
            raise StorageError(f"cannot lock {self.path}: {error.strerror or error}") from error
        self._release = weakref.finalize(self, _release_lock_file, self._file)
        self._mine: set[int] = set()

    @property
    def here(self) -> bool:
        """False in a process that was forked off: the claims are the parent's."""
        return self._file.process == os.getpid()

    def use(self) -> bool:
        """Say that the store is in use until ``release``; False: somebody is removing it, or has."""
        with _guard:
            if not self._file.lock(_USE_BYTE, shared=True):
                return False
        return self._current()

    def acquire_exclusive(self) -> bool:
        """Keep all others out until ``release``; False: somebody uses the store, or it is another one by now."""
        with _guard:
            return self._file.users == 1 and self._file.lock(_USE_BYTE) and self._current()

    def _current(self) -> bool:
        """Whether the file that is locked is the one that stands there."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return self._file.identity == (found.st_dev, found.st_ino)

    def claim(self, block: int) -> bool:
        """Whether this store may write a block (a number over all views) from now on, until ``release``.

        Raises:
            OSError: the file system has no locks.
        """
        if not self.here:
            return False
        if block in self._mine:
            return True
        with _guard:
            if self._file.owners.get(block) is not None or not self._file.lock(block):
                return False
            self._file.owners[block] = self
        self._mine.add(block)
        return True

    @contextlib.contextmanager
    def growth_lock(self) -> Iterator[None]:
        """Alone among all processes while a file grows; waits for its turn."""
        with _guard:
            self._file.lock(_GROWTH_BYTE, wait=True)
            try:
                yield
            finally:
                self._file.unlock(_GROWTH_BYTE)

    def release(self) -> None:
        """Let others write.  May be called twice."""
        with _guard, contextlib.suppress(OSError):
            if self.here and self._release.alive:
                for block in self._mine:
                    self._file.owners.pop(block, None)
                    self._file.unlock(block)
        self._mine.clear()
        self._release()


def _acquire_lock_file(path: Path) -> _LockFile:
    with _guard:
        found = path.stat() if path.exists() else None
        known: Any = None if found is None else _open_locks.get((found.st_dev, found.st_ino))
        if known is None or known.process != os.getpid():
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a read-only store has readers
            found = os.fstat(handle)
            known = _open_locks[found.st_dev, found.st_ino] = _LockFile((found.st_dev, found.st_ino), handle)
        known.users += 1
        return known  # type: ignore[no-any-return]


def _release_lock_file(file: _LockFile) -> None:
    with _guard:
        file.users -= 1
        if file.users == 0 and file.process == os.getpid():
            os.close(file.handle)
            _open_locks.pop(file.identity, None)


def _after_fork() -> None:
    global _guard
    _guard = threading.RLock()  # another thread may have held it
    _open_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


BLOCK = 4096  # records
PAGE = 4096  # bytes
_CHECKSUM_SIZE = 4  # bytes
_UINT32_MAX = 0xFFFFFFFF

Bits = NDArray[np.uint8]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class FileLayout:
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
    def of(cls, manifest: CacheManifest) -> "FileLayout":
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
        return check.to_bytes(_CHECKSUM_SIZE, "little") + bits.tobytes()

    def read_mark(self, block: int, mark: bytes) -> tuple[int, Bits] | None:
        """Checksum and bits of a mark; None where the bytes cannot be one.

        Args:
            block: whose mark it is.
            mark: all bytes up to the next mark; what is missing at the end of the file counts as zeros.
        """
        mark = mark.ljust(_CHECKSUM_SIZE + self.width, b"\0")
        bits = np.frombuffer(mark, np.uint8, self.width, _CHECKSUM_SIZE).copy()
        count = len(self.ids_of(block))
        beyond = np.unpackbits(bits, bitorder="little")[count:]
        if beyond.any() or any(mark[_CHECKSUM_SIZE + self.width :]):
            return None
        return int.from_bytes(mark[:_CHECKSUM_SIZE], "little"), bits

    @property
    def _per_page(self) -> int:
        return PAGE // (_CHECKSUM_SIZE + self.width)

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
            zlib.crc32(records[at * size : (at + 1) * size], (start + sample) & _UINT32_MAX)
            for at, sample in enumerate(ids)
        ]


def sum_checksums(checks: Iterable[int], before: int = 0) -> int:
    """The sum of checksums modulo 2**32.

    Example:
        >>> sum_checksums([0xFFFFFFFF, 2])
        1
    """
    return (sum(checks) + before) & _UINT32_MAX


def are_bits_set(bits: Bits, ids: Ids) -> NDArray[np.bool_]:
    """Which bits are set; ``bits`` is one-dimensional."""
    found: NDArray[np.bool_] = (bits[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1 == 1
    return found


RECORDS_FILE, MARKS_FILE = "logits.bin", "done.bin"
_CHUNK = 1 << 20
_ALLOCATION_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class CacheFiles:
    """Open handles of both files; created empty where they are missing.

    Args:
        folder: the store's.
        layout: of the store.
        write: False: they are opened to be read, and must be there.

    Raises:
        OSError: as the system says it; of all methods too.
    """

    def __init__(self, folder: Path, layout: FileLayout, *, write: bool = True) -> None:
        self.folder, self.layout, self.writable = folder, layout, write
        self._records = self._open(folder / RECORDS_FILE)
        try:
            self._marks = self._open(folder / MARKS_FILE)
        except OSError:
            os.close(self._records)
            raise
        self._release = weakref.finalize(self, _close_all, self._records, self._marks)
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
        return _pread(self._records, view * self.layout.view_bytes + ids.start * size, len(ids) * size)

    def write_records(self, view: int, first: int, records: memoryview) -> None:
        """Put records at ``first`` and the following places."""
        _pwrite(self._records, view * self.layout.view_bytes + first * self.layout.nbytes, records)

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
        text = _pread(self._marks, places[0], places[-1] - places[0])
        return [text[at - places[0] : to - places[0]] for at, to in itertools.pairwise(places)]

    def write_mark(self, view: int, block: int, mark: bytes) -> None:
        """Replace a mark, and all bytes up to the next one."""
        at, end = self.layout.marks_at(view)[block : block + 2].tolist()
        _pwrite(self._marks, at, memoryview(mark.ljust(end - at, b"\0")))

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
            if error.errno not in _ALLOCATION_UNSUPPORTED:
                raise
    for at in range(start, start + length, _CHUNK):
        _pwrite(handle, at, memoryview(bytes(min(_CHUNK, start + length - at))))


def _pread(handle: int, at: int, length: int) -> bytes:
    """Up to the end of the file."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(handle, length, at)):
        parts.append(part)
        at, length = at + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _pwrite(handle: int, at: int, data: memoryview) -> None:
    while len(data):
        count = os.pwrite(handle, data, at)
        at, data = at + count, data[count:]


def _close_all(*handles: int) -> None:
    for handle in handles:
        os.close(handle)
