"""A cache of one teacher's outputs for the views of one split's images, on disk; list, find and remove caches.

``<root>/<key>/`` holds ``manifest.json`` (what the records are outputs of; its time is that of the last use),
``logits.bin`` ([view][sample] records) and ``done.bin`` (a checksum for each).  Any number of processes read a cache,
and one writes it: each holds ``logits.bin`` shared, the one that writes ``done.bin``, in locks that end with the
process.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from potstill.distillation.teacher_cache.record_format import (
    MANIFEST_FILE,
    Bytes,
    CacheManifest,
    RecordFormat,
    canonical_json,
)
from potstill.errors import ArtifactError, StorageError, UsageError, did_you_mean, storing
from potstill.record_file import RecordFile, consecutive

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORDS_FILE, CHECKSUMS_FILE = "logits.bin", "done.bin"
_CLOCK_RESOLUTION = 50_000_000  # ns
_OPEN_ATTEMPTS = 40  # of 0.05 s each, while another process removes the cache
_SMALL_RECORD = 128  # bytes; a CRC-16 is as fast as a CRC-32 there, and takes eight times as long at 2,000
_COPIED_RECORDS = 4096  # at a time

Ids = NDArray[np.int64]


@dataclass
class _View:
    """Which records of a view exist: a byte of memory a record."""

    present: NDArray[np.bool_]  # [N]
    records: Bytes = field(default_factory=lambda: np.empty((0, 0), np.uint8))  # the file's memory map, once read
    damaged: Ids = field(default_factory=lambda: np.empty(0, np.int64))  # whose checksums do not match
    read_at: int = -1  # modification time of the checksums, as last read
    added: list[tuple[Ids, list[int]]] = field(default_factory=list)  # ids and checksums that are not in the file yet


class TeacherCache:
    """An open cache of ``samples`` N, returned by ``open`` or ``open_existing``."""

    def __init__(self, path: Path, manifest: CacheManifest, file: RecordFile) -> None:
        self.path, self._file = path, file
        self.identity, self.facts = manifest.identity, manifest.facts
        self.record, self.samples = manifest.record, manifest.samples
        self._views: dict[int, _View] = {}
        self._process = os.getpid()  # a forked process writes nothing
        self._writing = self._failed = self._closed = False
        with contextlib.suppress(OSError):
            os.utime(path / MANIFEST_FILE)  # its modification time is that of the last use

    @classmethod
    def open(
        cls, root: Path, identity: Mapping[str, Any], record: RecordFormat, samples: int, facts: Mapping[str, Any]
    ) -> "TeacherCache":
        """Return the cache of this identity, JSON values that determine the outputs; create it, with ``facts``, if
        there is none.

        StorageError: it cannot be created or opened.  ArtifactError: it is damaged, or of another version's format.
        """
        manifest = CacheManifest(json.loads(canonical_json(identity)), record, samples, facts)
        return cls._open(root / manifest.key, manifest)

    @classmethod
    def open_existing(cls, path: Path) -> "TeacherCache":
        """Return the cache in this folder; ArtifactError: there is none, it is damaged, or of another version."""
        return cls._open(path, None)

    @classmethod
    def _open(cls, path: Path, new: CacheManifest | None) -> "TeacherCache":
        if fcntl is None:
            raise StorageError("teacher caches need file locks, which this system does not have")
        for attempt in range(_OPEN_ATTEMPTS):
            try:
                if new is not None and not (path / MANIFEST_FILE).exists():
                    new.write(path)
                manifest = CacheManifest.read(path)
                file = _open_files(path, manifest)
                if _lock(file.records, fcntl.LOCK_SH) and _is_current(file.records, path):
                    return cls(path, manifest, file)
                file.close()
            except (StorageError, ArtifactError, OSError) as error:
                # A folder may be moved away between any two of the calls above.
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                if new is None or not isinstance(cause, FileNotFoundError) or attempt == _OPEN_ATTEMPTS - 1:
                    if isinstance(error, OSError):
                        raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
                    raise
            time.sleep(0.05)
        raise StorageError(f"{path} is being removed by another process; try again, or see `potstill cache ls`")

    @property
    def views(self) -> int:
        """Number of views; each view with records is below it."""
        return -(-self._file.count() // self.samples)

    def read(self, view: int, ids: Ids) -> tuple[Bytes, NDArray[np.bool_]]:
        """Return records [B, nbytes] of samples [B] in one view, zeros if missing, and which exist, [B].  A view's
        checksums are compared when it is first read: damaged records count as missing.
        """
        try:
            state = self._view(view, ids)
            present = state.present[ids]
            if not present.all():
                self._refresh(view, state)
                present = state.present[ids]
            if present.all():
                return self._records(view, state)[ids], present
            records = np.zeros((len(ids), self.record.nbytes), np.uint8)
            if present.any():
                records[present] = self._records(view, state)[ids[present]]
            return records, present
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def write(self, view: int, ids: Ids, records: Bytes) -> None:
        """Write records [B, nbytes] of samples [B]; they can be read at once, and are safe on disk after ``flush``.

        Existing records are not replaced, and records with NaN or infinity are skipped.  While another process writes
        this cache, nothing is written.  A StorageError (full disk, read-only) is raised once; later calls do nothing.
        """
        if self._failed:
            return
        try:
            if not self._file.writable:
                raise PermissionError(0, "it is read-only")
            self._write(view, ids, records)
        except OSError as error:
            self._fail(RECORDS_FILE, error)

    def flush(self) -> None:
        """Write records and checksums to disk.  However the process ends, no incomplete record is ever read."""
        added = [
            (view * self.samples + ids, checksums)
            for view, state in self._views.items()
            for ids, checksums in state.added
        ]
        if self._failed or not added or self._process != os.getpid():
            return
        numbers = np.concatenate([each for each, _ in added])
        checksums = np.concatenate([np.array(each, np.uint32) for _, each in added])
        order = np.argsort(numbers)
        try:
            self._file.mark(numbers[order], checksums[order])
        except OSError as error:
            self._fail(CHECKSUMS_FILE, error)
        for state in self._views.values():
            state.damaged = state.damaged[~state.present[state.damaged]]
            state.added.clear()

    def close(self) -> None:
        """Flush, and let another process write.  May be called twice."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = self._failed = True
            self._views.clear()
            if self._process == os.getpid():  # forked processes have the handles, too
                for handle in (self._file.records, self._file.checksums):
                    fcntl.flock(handle, fcntl.LOCK_UN)
            self._file.close()

    def coverage(self, views: int | None = None) -> list[int]:
        """Return the number of records by view, of ``views`` or of all."""
        no_ids = np.empty(0, np.int64)
        with storing(f"read {self.path}"):
            count = self.views if views is None else views
            return [int(self._view(view, no_ids).present.sum()) for view in range(count)]

    def damaged(self) -> list[tuple[int, int]]:
        """Return (view, sample) of damaged records, which count as missing."""
        self.coverage()
        return [(view, sample) for view, state in sorted(self._views.items()) for sample in state.damaged.tolist()]

    def _records(self, view: int, state: _View) -> Bytes:
        """Return the records of a view, shape [N, nbytes] or fewer if the file ends before; a memory map."""
        if len(state.records) < self.samples:
            found = self._file.mapped(view * self.samples, (view + 1) * self.samples)
            size = self.record.nbytes
            state.records = found[: len(found) // size * size].reshape(-1, size)
        return state.records

    def _view(self, view: int, ids: Ids) -> _View:
        if view < 0 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.samples):
            raise IndexError(f"view {view} of samples {ids} in a cache of {self.samples} samples")
        if view not in self._views:
            new = _View(np.zeros(self.samples, bool))
            self._refresh(view, new)
            self._views[view] = new
        return self._views[view]

    def _refresh(self, view: int, state: _View) -> None:
        """Compare the checksums that the file has for records which are not known to exist."""
        changed_at = self._file.changed_at()
        if changed_at == state.read_at:
            return
        # A file may change twice within one tick of its clock.
        state.read_at = changed_at if time.time_ns() - changed_at > _CLOCK_RESOLUTION else -1
        checksums = self._file.read_checksums(view * self.samples, (view + 1) * self.samples)
        ids = np.flatnonzero((checksums != 0) & ~state.present)
        intact = self._file.intact(view * self.samples + ids, checksums[ids])
        state.present[ids[intact]] = True
        state.damaged = ids[~intact]

    def _write(self, view: int, ids: Ids, records: Bytes) -> None:
        state = self._view(view, ids)
        order = np.unique(ids, return_index=True)[1]
        order = order[~state.present[ids[order]] & self.record.finite(records[order])]
        if not len(order) or not self._acquire():
            return
        self._refresh(view, state)  # the last writer may have added some
        order = order[~state.present[ids[order]]]
        if not len(order):
            return
        first, size = view * self.samples, self.record.nbytes
        self._file.reserve(first, first + self.samples)
        new_ids, content = ids[order], np.ascontiguousarray(records[order]).reshape(-1).data
        for start, stop in consecutive(new_ids):
            self._file.write(first + int(new_ids[start]), content[start * size : stop * size])
        numbers = (first + new_ids).tolist()
        checksums = [
            self._file.checksum(number, content[at * size : (at + 1) * size]) for at, number in enumerate(numbers)
        ]
        state.present[new_ids] = True
        state.added.append((new_ids, checksums))

    def _acquire(self) -> bool:
        """Return whether this cache writes, from now on until ``close``."""
        if self._process != os.getpid():
            return False
        if not self._writing and _lock(self._file.checksums, fcntl.LOCK_EX):
            self._writing = True
            for state in self._views.values():
                state.read_at = -1
        return self._writing

    def _fail(self, name: str, error: OSError) -> NoReturn:
        self._failed = True
        raise StorageError(f"cannot write {self.path / name}: {error.strerror or error}") from error


def _open_files(path: Path, manifest: CacheManifest, *, write: bool = True) -> RecordFile:
    seed = zlib.crc32(manifest.key.encode())
    nbytes = manifest.record.nbytes
    width: Literal[2, 4] = 2 if nbytes <= _SMALL_RECORD else 4
    return RecordFile(path / RECORDS_FILE, path / CHECKSUMS_FILE, nbytes, seed, width=width, write=write)


def _lock(handle: int, kind: int) -> bool:
    """Try to lock an open file until its handle is closed, in this process and all that were forked from it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(records: int, path: Path) -> bool:
    """Return whether the open file of records is still the one in this folder."""
    try:
        return os.path.samestat(os.fstat(records), (path / RECORDS_FILE).stat())
    except OSError:
        return False


def copy_from_wider(cache: TeacherCache) -> int:
    """Copy missing records of logits alone from caches that have embeddings beside them; return how many."""
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
            with closing(TeacherCache.open_existing(folder)) as wider:
                copied += _copy_records(wider, cache)
            cache.flush()
    return copied


def _copy_records(wider: TeacherCache, target: TeacherCache) -> int:
    """Copy the logits, which are the first bytes of a record."""
    copied = 0
    for view, (there, here) in enumerate(zip(wider.coverage(), target.coverage(wider.views), strict=True)):
        if here >= there:
            continue
        for start in range(0, wider.samples, _COPIED_RECORDS):
            ids = np.arange(start, min(start + _COPIED_RECORDS, wider.samples), dtype=np.int64)
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
    """A cache in a listing; only its manifest is checked."""

    path: Path
    size: int  # bytes on the disk
    last_used: float  # when it was last opened, in seconds since 1970
    manifest: CacheManifest | None  # identity and format; None if it cannot be read
    recorded: tuple[int, ...] = ()  # number of records by view
    error: str = ""  # why the cache cannot be used; empty if it can

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
    """Return the caches of a folder, the last used first."""
    return sorted(map(_read_entry, _cache_folders(root)), key=lambda each: (-each.last_used, each.key))


def find_cache(root: Path, key: str) -> Path:
    """Return the folder of a cache by the first 4 or more characters of its key; UsageError names the nearest."""
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
    """Delete a cache, damaged or not; return the freed bytes.  StorageError: it is in use, or cannot be deleted."""
    handle = -1
    try:
        handle = os.open(path / RECORDS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # a missing file, too
        if not (_lock(handle, fcntl.LOCK_EX) and _is_current(handle, path)):
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
        if handle >= 0:
            os.close(handle)
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
        with _open_files(path, manifest, write=False) as file:
            count = file.count()
            present = file.read_checksums(0, count) != 0
    except OSError as error:
        return CacheEntry(path, size, used, manifest, error=f"cannot read {path}: {error.strerror or error}")
    recorded = [int(present[start : start + manifest.samples].sum()) for start in range(0, count, manifest.samples)]
    return CacheEntry(path, size, used, manifest, tuple(recorded))


def _last_use(path: Path) -> float:
    for name in (path / MANIFEST_FILE, path):
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
