"""A cache of one teacher's outputs for the views of one split's images, on disk; list, find and remove caches.  No
torch here.

``<root>/<key>/`` holds ``manifest.json`` (what the records are outputs of), ``logits.bin`` (the records), ``done.bin``
(which of them exist, with checksums) and ``lock`` (which process writes which block).  Any number of processes may
read and write one cache at once; each block of records is written by one of them.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from potstill.distillation.teacher_cache.files import (
    BLOCK,
    MARKS_FILE,
    RECORDS_FILE,
    BlockLocks,
    CacheFiles,
    FileLayout,
    Ids,
    are_bits_set,
    sum_checksums,
)
from potstill.distillation.teacher_cache.files import LOCK_FILE as LOCK
from potstill.distillation.teacher_cache.record_format import (
    MANIFEST_FILE,
    Bytes,
    CacheManifest,
    RecordFormat,
    canonical_json,
)
from potstill.errors import ArtifactError, StorageError, UsageError, did_you_mean

_CLOCK_RESOLUTION = 50_000_000  # ns
_BIT_COUNTS = np.array([value.bit_count() for value in range(256)], np.uint8)


class ViewMarks:
    """The marks of a view; they take about a fifth of a byte of memory a record.

    Args:
        layout: of the cache.
        files: of the cache.
        view: its number.

    Raises:
        OSError: from the constructor and from all methods.
    """

    def __init__(self, layout: FileLayout, files: CacheFiles, view: int) -> None:
        self.layout, self.files, self.view = layout, files, view
        self.owned: set[int] = set()  # blocks that only this cache writes
        self.dirty: set[int] = set()  # blocks with records that are not marked in the file yet
        self.damaged: set[int] = set()  # blocks whose checksums do not match
        self._bits = np.zeros((layout.blocks, layout.width), np.uint8)
        self._flat = self._bits.reshape(-1)
        self._checksums = [0] * layout.blocks
        self._read_marks = [b""] * layout.blocks  # as last read from the file
        self._mtime = -1
        self.refresh()

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which records exist; shape [B]."""
        return are_bits_set(self._flat, ids)

    @property
    def count(self) -> int:
        """Number of records."""
        return int(_BIT_COUNTS[self._flat].sum(dtype=np.int64))

    def refresh(self) -> None:
        """Read the marks that other processes have written since."""
        mtime = self.files.marks_mtime()
        if mtime == self._mtime:
            return
        # A file may change twice within one tick of its clock.
        self._mtime = mtime if time.time_ns() - mtime > _CLOCK_RESOLUTION else -1
        for block, mark in enumerate(self.files.read_marks(self.view)):
            if block not in self.owned and mark != self._read_marks[block]:
                self._load(block, mark)

    def set_owned(self, block: int) -> None:
        """Call once the block's lock is held: from now on, only this cache writes it."""
        if block not in self.owned:
            mark = self.files.read_marks(self.view, block, block + 1)[0]
            if mark != self._read_marks[block]:
                self._load(block, mark)
            self.owned.add(block)

    def add(self, ids: Ids, records: memoryview) -> None:
        """Mark records in memory, after they were written.

        Args:
            ids: of samples in ``owned`` blocks; distinct, and without records before.
            records: their bytes.
        """
        samples = ids.tolist()
        for sample, checksum in zip(samples, self.layout.checksums(self.view, samples, records), strict=True):
            block = sample // BLOCK
            self._checksums[block] = sum_checksums((checksum,), self._checksums[block])
            self.dirty.add(block)
        np.bitwise_or.at(self._flat, ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8))

    def write(self) -> None:
        """Write the marks of added records; the records must be on the disk before."""
        for block in sorted(self.dirty):
            self.files.write_mark(self.view, block, self.layout.encode_mark(self._checksums[block], self._bits[block]))
        self.damaged -= self.dirty
        self.dirty.clear()

    def _load(self, block: int, mark: bytes) -> None:
        """Use a mark from the file if its checksum matches the records."""
        self._read_marks[block] = mark
        self._bits[block], self._checksums[block] = 0, 0
        self.damaged.discard(block)
        decoded = self.layout.decode_mark(block, mark)
        if decoded is None:
            self.damaged.add(block)
            return
        checksum, bits = decoded
        if not bits.any() and not checksum:
            return
        if checksum != self._compute_checksum(block, bits):
            self.damaged.add(block)
            return
        self._bits[block], self._checksums[block] = bits, checksum

    def _compute_checksum(self, block: int, bits: NDArray[np.uint8]) -> int | None:
        """Return the checksum of the marked records in the file; None if the file ends before them."""
        rows = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        size = self.layout.nbytes
        records = np.frombuffer(self.files.read_block(self.view, block), np.uint8)
        records = records[: len(records) // size * size].reshape(-1, size)
        if not len(rows):
            return 0
        if rows[-1] >= len(records):
            return None
        marked = records[rows].reshape(-1).data
        return sum_checksums(self.layout.checksums(self.view, (rows + block * BLOCK).tolist(), marked))


_OPEN_ATTEMPTS = 40  # of 0.05 s each, while another process removes the cache


class TeacherCache:
    """An open cache, returned by ``open`` or ``open_existing``.

    Attributes:
        path: its folder.
        identity: everything that determines the outputs.
        facts: further information, for listings.
        record: encoding of the outputs.
        samples: N.
    """

    def __init__(self, path: Path, manifest: CacheManifest, locks: BlockLocks) -> None:
        self.path, self._locks = path, locks
        self.identity, self.facts = manifest.identity, manifest.facts
        self.record, self.samples = manifest.record, manifest.samples
        self._layout = FileLayout.of(manifest)
        self._view_marks: dict[int, ViewMarks] = {}
        self._failed = self._closed = False
        try:
            self._files = CacheFiles(path, self._layout)
        except OSError as error:
            locks.release()
            raise StorageError(f"cannot open {error.filename or path}: {error.strerror or error}") from error
        with contextlib.suppress(OSError):
            os.utime(locks.path)  # its modification time is that of the last use

    @classmethod
    def open(
        cls, root: Path, identity: Mapping[str, Any], record: RecordFormat, samples: int, facts: Mapping[str, Any]
    ) -> "TeacherCache":
        """Return the cache of this identity; create it if there is none.

        Args:
            root: the folder of all caches.
            identity: everything that determines the outputs, as JSON values; with ``record`` and ``samples`` it gives
                the key.  Other teacher weights, data or views: another cache.
            record: encoding of the outputs.
            samples: N >= 1.
            facts: information for listings; used only if the cache is created.

        Raises:
            StorageError: it cannot be created or opened.
            ArtifactError: it is damaged, or of another version's format.
        """
        manifest = CacheManifest(json.loads(canonical_json(identity)), record, samples, facts)
        return cls._open(root / manifest.key, manifest)

    @classmethod
    def open_existing(cls, path: Path) -> "TeacherCache":
        """Return the cache in this folder.

        Raises:
            StorageError: it cannot be opened.
            ArtifactError: there is none, it is damaged, or of another version's format.
        """
        return cls._open(path, None)

    @classmethod
    def _open(cls, path: Path, new: CacheManifest | None) -> "TeacherCache":
        for attempt in range(_OPEN_ATTEMPTS):
            try:
                if new is not None and not (path / MANIFEST_FILE).exists():
                    new.write(path)
                manifest = CacheManifest.read(path)
                locks = BlockLocks(path)
                if locks.acquire_shared():
                    return cls(path, manifest, locks)
                locks.release()
            except OSError as error:
                raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
            except (StorageError, ArtifactError) as error:
                # A folder may be moved away between any two of the calls above.
                removed = new is not None and isinstance(error.__cause__, FileNotFoundError)
                if not removed or attempt == _OPEN_ATTEMPTS - 1:
                    raise
            time.sleep(0.05)
        raise StorageError(f"{path} is being removed by another process; try again, or see `potstill cache ls`")

    @property
    def views(self) -> int:
        """Number of views; each view with records is below it."""
        return self._files.views()

    def read(self, view: int, ids: Ids) -> tuple[Bytes, NDArray[np.bool_]]:
        """Read records of one view.

        Args:
            view: from 0; any number.
            ids: of samples, shape [B], in [0, N).

        Returns:
            Records [B, nbytes], zeros if missing; and which of them exist, [B].  A view's checksums are compared when
            it is first read: the records of a damaged block count as missing.

        Raises:
            StorageError: an I/O error.
        """
        try:
            marks = self._marks(view, ids)
            present = marks.has(ids)
            if not present.all():
                marks.refresh()
                present = marks.has(ids)
            if present.all():
                return self._files.read_view(view)[ids], present
            records = np.zeros((len(ids), self.record.nbytes), np.uint8)
            if present.any():
                records[present] = self._files.read_view(view)[ids[present]]
            return records, present
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def write(self, view: int, ids: Ids, records: Bytes) -> None:
        """Write records; they can be read at once, and are safe on disk after ``flush``.

        Existing records are not replaced.  Records with NaN or infinity are skipped, as are blocks that another process
        writes.

        Args:
            view: from 0.
            ids: of samples, shape [B], in [0, N).
            records: shape [B, nbytes].

        Raises:
            StorageError: a full disk, an I/O error, or a read-only cache; raised once, later calls do nothing.
        """
        if self._failed:
            return
        try:
            if not self._files.writable:
                raise PermissionError(0, "it is read-only")
            self._write(view, ids, records)
        except OSError as error:
            self._fail(RECORDS_FILE, error)

    def flush(self) -> None:
        """Write records and marks to disk.  However the process ends, no incomplete record is ever read.

        Raises:
            StorageError: a full disk or an I/O error; raised once, later calls do nothing.
        """
        dirty = [marks for marks in self._view_marks.values() if marks.dirty]
        if self._failed or not dirty or not self._locks.is_owner:
            return
        try:
            self._files.sync_records()
            for marks in dirty:
                marks.write()
            self._files.sync_marks()
        except OSError as error:
            self._fail(MARKS_FILE, error)

    def close(self) -> None:
        """Flush, and release all blocks for other processes.  May be called twice.

        Raises:
            StorageError: as ``flush``.
        """
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = self._failed = True
            self._view_marks.clear()
            self._files.close()
            self._locks.release()

    def coverage(self, views: int | None = None) -> list[int]:
        """Return the number of records by view.

        Args:
            views: number of views; None: all of the cache.

        Raises:
            StorageError: an I/O error.
        """
        no_ids = np.empty(0, np.int64)
        try:
            return [self._marks(view, no_ids).count for view in range(self.views if views is None else views)]
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def damaged(self) -> list[tuple[int, int]]:
        """Return (view, block) of damaged blocks, whose records count as missing.

        Raises:
            StorageError: an I/O error.
        """
        self.coverage()
        return [(view, block) for view, marks in sorted(self._view_marks.items()) for block in sorted(marks.damaged)]

    def _marks(self, view: int, ids: Ids) -> ViewMarks:
        if view < 0 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.samples):
            raise IndexError(f"view {view} of samples {ids} in a cache of {self.samples} samples")
        if view not in self._view_marks:
            self._view_marks[view] = ViewMarks(self._layout, self._files, view)
        return self._view_marks[view]

    def _write(self, view: int, ids: Ids, records: Bytes) -> None:
        marks = self._marks(view, ids)
        order = np.unique(ids, return_index=True)[1]
        order = order[~marks.has(ids[order]) & self.record.finite(records[order])]
        blocks = ids[order] // BLOCK
        owned = [block for block in np.unique(blocks).tolist() if self._acquire(marks, block)]
        order = order[np.isin(blocks, owned)]
        order = order[~marks.has(ids[order])]  # the block's last owner may have written some
        if not len(order):
            return
        self._files.reserve(view, self._locks.growth_lock)
        new_ids, new_records = ids[order], np.ascontiguousarray(records[order]).reshape(-1).data
        size = self.record.nbytes
        ends = [*np.flatnonzero(np.diff(new_ids) != 1).tolist(), len(new_ids) - 1]
        start = 0
        for end in ends:  # consecutive ids in one call
            self._files.write_records(view, int(new_ids[start]), new_records[start * size : (end + 1) * size])
            start = end + 1
        marks.add(new_ids, new_records)

    def _acquire(self, marks: ViewMarks, block: int) -> bool:
        if not self._locks.acquire_block(marks.view * self._layout.blocks + block):
            return False
        marks.set_owned(block)
        return True

    def _fail(self, name: str, error: OSError) -> NoReturn:
        self._failed = True
        raise StorageError(f"cannot write {self.path / name}: {error.strerror or error}") from error


def copy_from_wider(cache: TeacherCache) -> int:
    """Copy missing records from caches of the same outputs that have embeddings beside them; return how many.

    A method that reads logits alone thus uses what another has recorded.

    Args:
        cache: of logits alone; with embeddings nothing is copied.
    """
    record, copied = cache.record, 0
    if record.embedding:
        return 0
    for folder in _cache_folders(cache.path.parent):
        with contextlib.suppress(ArtifactError, StorageError):  # damaged, just removed, or read-only: the teacher runs
            found = CacheManifest.read(folder)
            if (found.identity, found.samples) != (cache.identity, cache.samples) or not found.record.embedding:
                continue
            if found.record != replace(record, embedding=found.record.embedding):
                continue
            # Opened again, so that no block stays with this process.
            with (
                closing(TeacherCache.open_existing(folder)) as wider,
                closing(TeacherCache.open_existing(cache.path)) as target,
            ):
                copied += _copy_records(wider, target)
    return copied


def _copy_records(wider: TeacherCache, target: TeacherCache) -> int:
    """Copy the logits, which are the first bytes of a record."""
    copied = 0
    for view, (there, here) in enumerate(zip(wider.coverage(), target.coverage(wider.views), strict=True)):
        if here >= there:
            continue
        for start in range(0, wider.samples, BLOCK):
            ids = np.arange(start, min(start + BLOCK, wider.samples), dtype=np.int64)
            records, present = wider.read(view, ids)
            missing = present & ~target.read(view, ids)[1]
            if missing.any():
                target.write(view, ids[missing], np.ascontiguousarray(records[missing, : target.record.nbytes]))
                copied += int(missing.sum())
    return copied


_KEY_PATTERN = re.compile(r"[0-9a-f]{16}")
_LEFTOVER_PATTERN = re.compile(r"\.[0-9a-f]{16}\.(removed|[0-9a-f]{8}\.new)")
_MIN_KEY_PREFIX = 4  # characters of an abbreviated key
_DELETE_ATTEMPTS = 5


@dataclass(frozen=True)
class CacheEntry:
    """A cache in a listing; only its manifest is checked.

    Attributes:
        path: its folder.
        size: bytes on the disk.
        last_used: when it was last opened, in seconds since 1970.
        manifest: identity and format; None if it cannot be read.
        recorded: number of records by view.
        error: why the cache cannot be used; empty if it can.
    """

    path: Path
    size: int
    last_used: float
    manifest: CacheManifest | None
    recorded: tuple[int, ...] = ()
    error: str = ""

    @property
    def key(self) -> str:
        """16 hex digits."""
        return self.path.name

    @property
    def coverage(self) -> float | None:
        """Share of records that exist, of all in the cache's views; None if it has no views."""
        if self.manifest is None or not self.recorded:
            return None
        return sum(self.recorded) / (len(self.recorded) * self.manifest.samples)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        entry: dict[str, Any] = {
            "key": self.key,
            "path": str(self.path),
            "bytes": self.size,
            "last_use": self.last_used,
        }
        if self.manifest is None:
            return entry | {"error": self.error}
        manifest, facts = self.manifest, self.manifest.facts
        record = manifest.record
        return entry | {
            "samples": manifest.samples,
            "views": len(self.recorded),
            "recorded": list(self.recorded),
            "record": {
                "kind": record.kind,
                "bytes": record.nbytes,
                "classes": record.classes,
                "embedding": record.embedding,
            },
            "teacher": facts.get("teacher"),
            "folder": facts.get("folder"),
            "data": facts.get("data"),
            "split": manifest.identity.get("split"),
            "error": self.error or None,
        }


def list_caches(root: Path) -> list[CacheEntry]:
    """Return the caches of a folder, the last used first.

    Raises:
        StorageError: the folder cannot be read.
    """
    return sorted(map(_read_entry, _cache_folders(root)), key=lambda each: (-each.last_used, each.key))


def find_cache(root: Path, key: str) -> Path:
    """Return the folder of a cache.

    Args:
        root: the folder of all caches.
        key: of the cache, or its unique beginning of at least 4 characters.

    Raises:
        UsageError: there is no such cache; the message names the nearest.
        StorageError: the folder cannot be read.
    """
    keys = [folder.name for folder in _cache_folders(root)]
    matches = [name for name in keys if name == key or (len(key) >= _MIN_KEY_PREFIX and name.startswith(key))]
    if len(matches) == 1:
        return root / matches[0]
    if matches:
        raise UsageError(f"several caches begin with {key!r}: {', '.join(sorted(matches))}")
    raise UsageError(
        f"no teacher cache {key!r} in {root}{did_you_mean(key, keys)}\nKnown: {', '.join(sorted(keys)) or 'none'}; "
        "`potstill cache ls` shows them"
    )


def remove_cache(path: Path) -> int:
    """Delete a cache, damaged or not.

    Returns:
        Freed bytes.

    Raises:
        StorageError: it is in use, or cannot be deleted.
    """
    locks = BlockLocks(path)  # creates a missing lock file: another process may be opening the cache
    try:
        if not locks.acquire_exclusive():
            raise StorageError(f"{path} is in use; wait for the run that uses it, or stop it")
        size = _disk_usage(path)
        renamed = path.with_name(f".{path.name}.removed")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(renamed)  # left by an interrupted removal
        path.rename(renamed)  # so that it disappears at once
        _delete(renamed)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error
    finally:
        locks.release()
    return size


def _delete(folder: Path) -> None:
    for attempt in range(_DELETE_ATTEMPTS):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:  # a process that is opening the cache may have created a file there
            if error.errno != errno.ENOTEMPTY or attempt == _DELETE_ATTEMPTS - 1:
                raise


def delete_leftovers(root: Path) -> None:
    """Delete folders left by an interrupted creation or removal of a cache."""
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if _LEFTOVER_PATTERN.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def _cache_folders(root: Path) -> list[Path]:
    try:
        return [
            each
            for each in root.iterdir()
            if _KEY_PATTERN.fullmatch(each.name) and each.is_dir() and not each.is_symlink()
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {root}: {error.strerror or error}") from error


def _read_entry(path: Path) -> CacheEntry:
    size, used = _disk_usage(path), _last_use(path)
    try:
        manifest = CacheManifest.read(path)
    except ArtifactError as error:
        return CacheEntry(path, size, used, None, error=str(error))
    try:
        return CacheEntry(path, size, used, manifest, _count_records(path, FileLayout.of(manifest)))
    except OSError as error:
        return CacheEntry(path, size, used, manifest, error=f"cannot read {path}: {error.strerror or error}")


def _count_records(path: Path, layout: FileLayout) -> tuple[int, ...]:
    files = CacheFiles(path, layout, write=False)
    try:
        counts = []
        for view in range(files.views()):
            marks = (layout.decode_mark(block, mark) for block, mark in enumerate(files.read_marks(view)))
            counts.append(sum(int.from_bytes(mark[1].tobytes(), "little").bit_count() for mark in marks if mark))
        return tuple(counts)
    finally:
        files.close()


def _last_use(path: Path) -> float:
    for name in (path / LOCK, path):
        with contextlib.suppress(OSError):
            return name.stat().st_mtime
    return 0.0


def _disk_usage(path: Path) -> int:
    """Return the allocated bytes; a file may have holes."""
    total = 0
    with contextlib.suppress(OSError):
        for each in os.scandir(path):
            status = each.stat(follow_symlinks=False)
            total += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return total
