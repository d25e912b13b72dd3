"""The files of a cache: layout and checksums, reading and writing, and locks on blocks.

``logits.bin``: [view][sample] records.  ``done.bin``: for each view and each block of 4096 of its records a mark: 4
bytes of checksum, then a bit for each record that is there.  No mark crosses a page, so a process that is killed leaves
the old or the new one.  Records without a mark are not read, nor are those that do not match its checksum.

Files are written by ``pwrite`` and read through a memory map: on a full disk, writing through a memory map would end
the process (SIGBUS) instead of raising an error.

Locks are POSIX locks on byte ranges of one file: the system releases them when the process ends.  They are held by
processes, not by objects, and closing any handle of the file releases them all; so a process has one handle for each
file.
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
_GROWTH_BYTE = 1 << 60  # beyond the number of any block
_USE_BYTE = _GROWTH_BYTE + 1
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_LOCK_DENIED = (errno.EAGAIN, errno.EACCES)

_open_locks: dict[tuple[int, int], "_LockFile"] = {}  # (device, inode) -> this process's handle
_guard = threading.RLock()


class _LockFile:
    """The only handle that this process has of a lock file."""

    def __init__(self, identity: tuple[int, int], handle: int) -> None:
        self.identity, self.handle, self.process = identity, handle, os.getpid()
        self.users = 0
        # Weak, so that a cache which was not closed holds no lock.
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
    """The locks of one open cache.

    Args:
        folder: of the cache; a file ``lock`` is created in it if there is none.

    Raises:
        StorageError: the system has no byte-range locks.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            raise StorageError("teacher caches need byte-range locks, which this system does not have")
        self.path = folder / LOCK_FILE
        try:
            self._file = _acquire_lock_file(self.path)
        except OSError as error:
            raise StorageError(f"cannot lock {self.path}: {error.strerror or error}") from error
        self._release = weakref.finalize(self, _release_lock_file, self._file)
        self._owned: set[int] = set()

    @property
    def is_owner(self) -> bool:
        """False in a forked process: the locks belong to its parent."""
        return self._file.process == os.getpid()

    def acquire_shared(self) -> bool:
        """Mark the cache as in use until ``release``; return False if it is being removed, or was."""
        with _guard:
            if not self._file.lock(_USE_BYTE, shared=True):
                return False
        return self._is_current()

    def acquire_exclusive(self) -> bool:
        """Exclude all others until ``release``; return False if the cache is in use, or was replaced."""
        with _guard:
            return self._file.users == 1 and self._file.lock(_USE_BYTE) and self._is_current()

    def _is_current(self) -> bool:
        """Return whether the locked file is still the one at this path."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return self._file.identity == (found.st_dev, found.st_ino)

    def acquire_block(self, block: int) -> bool:
        """Return whether this cache may write a block (numbered over all views) from now on, until ``release``.

        Raises:
            OSError: the file system has no locks.
        """
        if not self.is_owner:
            return False
        if block in self._owned:
            return True
        with _guard:
            if self._file.owners.get(block) is not None or not self._file.lock(block):
                return False
            self._file.owners[block] = self
        self._owned.add(block)
        return True

    @contextlib.contextmanager
    def growth_lock(self) -> Iterator[None]:
        """Exclude all other processes while a file grows; waits for them."""
        with _guard:
            self._file.lock(_GROWTH_BYTE, wait=True)
            try:
                yield
            finally:
                self._file.unlock(_GROWTH_BYTE)

    def release(self) -> None:
        """Release all locks.  May be called twice."""
        with _guard, contextlib.suppress(OSError):
            if self.is_owner and self._release.alive:
                for block in self._owned:
                    self._file.owners.pop(block, None)
                    self._file.unlock(block)
        self._owned.clear()
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
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a read-only cache can be read
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
    """File layout of a cache of N samples.

    Args:
        samples: N >= 1.
        nbytes: of one record.
        seed: of the checksums, so that those of another cache do not match.
    """

    samples: int
    nbytes: int
    seed: int

    @classmethod
    def of(cls, manifest: CacheManifest) -> "FileLayout":
        """Return the layout for a manifest."""
        return cls(manifest.samples, manifest.record.nbytes, zlib.crc32(manifest.key.encode()))

    @property
    def blocks(self) -> int:
        """Number of blocks in a view."""
        return -(-self.samples // BLOCK)

    @property
    def width(self) -> int:
        """Bytes of the bits in a mark; fewer if there are fewer samples than in a block."""
        return -(-min(self.samples, BLOCK) // 8)

    @property
    def view_bytes(self) -> int:
        """Bytes of a view's records."""
        return self.samples * self.nbytes

    def ids_of(self, block: int) -> range:
        """Return the sample ids of a block."""
        return range(block * BLOCK, min(self.samples, (block + 1) * BLOCK))

    # marks

    def mark_offsets(self, view: int) -> NDArray[np.int64]:
        """Return the offsets of a view's marks in done.bin and the end of the last one: blocks + 1 numbers."""
        page, slot = np.divmod(np.arange(self.blocks + 1, dtype=np.int64) + view * self.blocks, self._per_page)
        offsets: NDArray[np.int64] = page * PAGE + slot * self._slot_bytes
        return offsets

    def views_in_size(self, size: int) -> int:
        """Return the number of views with a mark in a done.bin of ``size`` bytes."""
        pages, rest = divmod(size, PAGE)
        marks = pages * self._per_page + min(self._per_page, -(-rest // self._slot_bytes))
        return -(-marks // self.blocks)

    def encode_mark(self, checksum: int, bits: Bits) -> bytes:
        """Return a mark's bytes."""
        return checksum.to_bytes(_CHECKSUM_SIZE, "little") + bits.tobytes()

    def decode_mark(self, block: int, mark: bytes) -> tuple[int, Bits] | None:
        """Return checksum and bits of a mark; None if it is malformed.

        Args:
            block: whose mark it is.
            mark: all bytes up to the next mark; missing bytes at the end of the file count as zeros.
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
    def _slot_bytes(self) -> int:
        return PAGE // self._per_page

    # checksums

    def checksums(self, view: int, ids: Iterable[int], records: bytes | memoryview) -> list[int]:
        """Return a CRC-32 for each record, of its bytes, view and sample id.

        A block's checksum is their sum modulo 2**32: records can be added in any order, and each changed bit changes
        it.

        Args:
            view: of all records.
            ids: of the samples.
            records: their bytes, concatenated.
        """
        size, start = self.nbytes, self.seed + view * self.samples
        return [
            zlib.crc32(records[at * size : (at + 1) * size], (start + sample) & _UINT32_MAX)
            for at, sample in enumerate(ids)
        ]


def sum_checksums(checksums: Iterable[int], initial: int = 0) -> int:
    """Return the sum of checksums modulo 2**32.

    Example:
        >>> sum_checksums([0xFFFFFFFF, 2])
        1
    """
    return (sum(checksums) + initial) & _UINT32_MAX


def are_bits_set(bits: Bits, ids: Ids) -> NDArray[np.bool_]:
    """Return which bits are set; ``bits`` is one-dimensional."""
    is_set: NDArray[np.bool_] = (bits[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1 == 1
    return is_set


RECORDS_FILE, MARKS_FILE = "logits.bin", "done.bin"
_CHUNK = 1 << 20
_ALLOCATION_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class CacheFiles:
    """Open handles of both files; missing ones are created empty.

    Args:
        folder: of the cache.
        layout: of the cache.
        write: if False, open existing files for reading.

    Raises:
        OSError: from the constructor and from all methods.
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
        self._folder_synced = False  # whether the folder's entries of both files are on disk
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
        """Close both handles.  May be called twice."""
        self._map = np.empty(0, np.uint8)
        self._release()

    # records

    def read_view(self, view: int) -> NDArray[np.uint8]:
        """Return a view's records, [N, nbytes] or fewer if the file ends before; a read-only memory map."""
        start, size = view * self.layout.view_bytes, self.layout.view_bytes
        if len(self._map) < start + size:
            length = os.fstat(self._records).st_size
            if length:
                self._map = np.frombuffer(mmap.mmap(self._records, length, prot=mmap.PROT_READ), np.uint8)
        records = self._map[start : start + size]
        rows = len(records) // self.layout.nbytes
        return records[: rows * self.layout.nbytes].reshape(rows, self.layout.nbytes)

    def read_block(self, view: int, block: int) -> bytes:
        """Return a block's records, fewer if the file ends before.  Not mapped, so that an I/O error is raised."""
        ids = self.layout.ids_of(block)
        size = self.layout.nbytes
        return _pread(self._records, view * self.layout.view_bytes + ids.start * size, len(ids) * size)

    def write_records(self, view: int, first: int, records: memoryview) -> None:
        """Write records at sample id ``first`` and the following ones."""
        _pwrite(self._records, view * self.layout.view_bytes + first * self.layout.nbytes, records)

    def reserve(self, view: int, growth_lock: Callable[[], AbstractContextManager[None]]) -> None:
        """Extend the file to the end of a view and allocate the disk space; undone if there is not enough.

        An unwritten view before the end may be a hole, which is filled as it is written.

        Args:
            view: to be written.
            growth_lock: excludes other processes, so that none overwrites new records with zeros.
        """
        end = (view + 1) * self.layout.view_bytes
        if os.fstat(self._records).st_size >= end:
            return
        with growth_lock():
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
        """Return the number of views with a mark."""
        return self.layout.views_in_size(os.fstat(self._marks).st_size)

    def marks_mtime(self) -> int:
        """Return the marks' modification time in ns, which changes when any process writes them."""
        return os.fstat(self._marks).st_mtime_ns

    def read_marks(self, view: int, first: int = 0, end: int | None = None) -> list[bytes]:
        """Return the marks of a view's blocks from ``first`` on, each with all bytes up to the next one."""
        offsets = self.layout.mark_offsets(view)[first : None if end is None else end + 1].tolist()
        marks = _pread(self._marks, offsets[0], offsets[-1] - offsets[0])
        return [marks[start - offsets[0] : end - offsets[0]] for start, end in itertools.pairwise(offsets)]

    def write_mark(self, view: int, block: int, mark: bytes) -> None:
        """Replace a mark, and all bytes up to the next one."""
        at, end = self.layout.mark_offsets(view)[block : block + 2].tolist()
        _pwrite(self._marks, at, memoryview(mark.ljust(end - at, b"\0")))

    def sync_marks(self) -> None:
        """Wait until the marks, and the folder's entries of both files, are on the disk."""
        os.fsync(self._marks)
        if not self._folder_synced:
            handle = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            self._folder_synced = True


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
    """Read up to ``length`` bytes, fewer at the end of the file."""
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
