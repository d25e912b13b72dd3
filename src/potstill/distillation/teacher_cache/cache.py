"""A cache of one teacher's outputs for the views of one split's images, on disk; list, find and remove caches. No
torch here.

``<root>/<key>/`` holds ``manifest.json`` (what the records are outputs of), ``logits.bin`` (the records), ``done.bin``
(which of them are there, with checksums) and ``lock`` (who writes where).  Any number of processes may read and write
one cache at once; each block of records is written by one of them.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
    """The marks of a view; about a fifth of a byte of memory a record.

    Args:
        layout: of the store.
        files: of the store.
        view: which.

    Raises:
        OSError: as the system says it; of all methods too.
    """

    def __init__(self, layout: FileLayout, files: CacheFiles, view: int) -> None:
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
        return are_bits_set(self._flat, ids)

    @property
    def count(self) -> int:
        """How many records are there."""
        return int(_BIT_COUNTS[self._flat].sum(dtype=np.int64))

    def refresh(self) -> None:
        """Look at what other processes have marked since."""
        changed = self.files.marks_changed()
        if changed == self._changed:
            return
        # A file may change twice within one tick of its clock.
        self._changed = changed if time.time_ns() - changed > _CLOCK_RESOLUTION else -1
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
            self._checks[block] = sum_checksums((check,), self._checks[block])
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
        return sum_checksums(self.layout.checks(self.view, (places + block * BLOCK).tolist(), there))


_OPEN_ATTEMPTS = 40  # of 0.05 s each, while another process removes the store


class TeacherCache:
    """An open store; ``open`` or ``existing`` makes one.

    Attributes:
        path: its folder.
        identity: what the records are answers to.
        facts: more about it, for people.
        record: how answers become bytes.
        samples: N.
    """

    def __init__(self, path: Path, manifest: CacheManifest, claims: BlockLocks) -> None:
        self.path, self._claims = path, claims
        self.identity, self.facts = manifest.identity, manifest.facts
        self.record, self.samples = manifest.record, manifest.samples
        self._layout = FileLayout.of(manifest)
        self._known: dict[int, ViewMarks] = {}
        self._failed = self._closed = False
        try:
            self._files = CacheFiles(path, self._layout)
        except OSError as error:
            claims.release()
            raise StorageError(f"cannot open {error.filename or path}: {error.strerror or error}") from error
        with contextlib.suppress(OSError):
            os.utime(claims.path)  # its time is that of the last use

    @classmethod
    def open(
        cls, root: Path, identity: Mapping[str, Any], record: RecordFormat, samples: int, facts: Mapping[str, Any]
    ) -> "TeacherCache":
        """The store of this identity; made where there is none yet.

        Args:
            root: the folder of all stores.
            identity: all that decides the answers, as plain JSON values; with ``record`` and ``samples`` it makes the
                key.  Other teacher weights, data, views: another store.
            record: how an answer is kept.
            samples: N >= 1.
            facts: for people; those of whoever makes the store are kept.

        Raises:
            StorageError: it cannot be made or opened here.
            ArtifactError: it is damaged, or of another version's format.
        """
        manifest = CacheManifest(json.loads(canonical_json(identity)), record, samples, facts)
        return cls._opened(root / manifest.key, manifest)

    @classmethod
    def existing(cls, path: Path) -> "TeacherCache":
        """The store in this folder.

        Raises:
            StorageError: it cannot be opened here.
            ArtifactError: there is none, it is damaged, or of another version's format.
        """
        return cls._opened(path, None)

    @classmethod
    def _opened(cls, path: Path, new: CacheManifest | None) -> "TeacherCache":
        for attempt in range(_OPEN_ATTEMPTS):
            try:
                if new is not None and not (path / MANIFEST_FILE).exists():
                    new.write(path)
                manifest = CacheManifest.read(path)
                claims = BlockLocks(path)
                if claims.use():
                    return cls(path, manifest, claims)
                claims.release()
            except OSError as error:
                raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
            except (StorageError, ArtifactError) as error:
                # A folder may be moved away between any two of the calls above.
                gone = new is not None and isinstance(error.__cause__, FileNotFoundError)
                if not gone or attempt == _OPEN_ATTEMPTS - 1:
                    raise
            time.sleep(0.05)
        raise StorageError(f"{path} is being removed by another process; try again, or see `potstill cache ls`")

    @property
    def views(self) -> int:
        """Views of which something has been recorded are below this number."""
        return self._files.views()

    def read(self, view: int, ids: Ids) -> tuple[Bytes, NDArray[np.bool_]]:
        """Records of one view.

        Args:
            view: from 0; any number.
            ids: of samples, shape [B], in [0, N).

        Returns:
            Records [B, nbytes], zeros where there is none; and which of them are there, [B].  A view's checksums are
            compared when it is first read: a damaged block counts as not recorded.

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
                return self._files.slab(view)[ids], present
            records = np.zeros((len(ids), self.record.nbytes), np.uint8)
            if present.any():
                records[present] = self._files.slab(view)[ids[present]]
            return records, present
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def write(self, view: int, ids: Ids, records: Bytes) -> None:
        """Record answers; they can be read at once, and last after ``flush``.

        What is there already stays.  Answers that are not finite are not kept.  Blocks that another process writes are
        left to it.

        Args:
            view: from 0.
            ids: of samples, shape [B], in [0, N).
            records: shape [B, nbytes].

        Raises:
            StorageError: a full disk, an I/O error, or a store that is read-only; once, later calls do nothing.
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
        """Make what was written last.  Whatever ends the process, no record is ever read that was not written whole.

        Raises:
            StorageError: a full disk or an I/O error; once, later calls do nothing.
        """
        dirty = [marks for marks in self._known.values() if marks.dirty]
        if self._failed or not dirty or not self._claims.here:
            return
        try:
            self._files.sync_records()
            for marks in dirty:
                marks.write()
            self._files.sync_marks()
        except OSError as error:
            self._fail(MARKS_FILE, error)

    def close(self) -> None:
        """Flush, and let other processes write.  May be called twice.

        Raises:
            StorageError: as ``flush``.
        """
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = self._failed = True
            self._known.clear()
            self._files.close()
            self._claims.release()

    def coverage(self, views: int | None = None) -> list[int]:
        """Records that are there, by view.

        Args:
            views: how many; None: all that the store has.

        Raises:
            StorageError: an I/O error.
        """
        nobody = np.empty(0, np.int64)
        try:
            return [self._marks(view, nobody).count for view in range(self.views if views is None else views)]
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def damaged(self) -> list[tuple[int, int]]:
        """(view, block) of the blocks whose records are not what was written; they count as not recorded.

        Raises:
            StorageError: an I/O error.
        """
        self.coverage()
        return [(view, block) for view, marks in sorted(self._known.items()) for block in sorted(marks.damaged)]

    def _marks(self, view: int, ids: Ids) -> ViewMarks:
        if view < 0 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.samples):
            raise IndexError(f"a store of {self.samples} samples, asked for view {view} of samples {ids}")
        if view not in self._known:
            self._known[view] = ViewMarks(self._layout, self._files, view)
        return self._known[view]

    def _write(self, view: int, ids: Ids, records: Bytes) -> None:
        marks = self._marks(view, ids)
        order = np.unique(ids, return_index=True)[1]
        order = order[~marks.has(ids[order]) & self.record.finite(records[order])]
        blocks = ids[order] // BLOCK
        held = [block for block in np.unique(blocks).tolist() if self._hold(marks, block)]
        order = order[np.isin(blocks, held)]
        order = order[~marks.has(ids[order])]  # a former writer may have been quicker
        if not len(order):
            return
        self._files.reserve(view, self._claims.growth_lock)
        chosen, kept = ids[order], np.ascontiguousarray(records[order]).reshape(-1).data
        size = self.record.nbytes
        ends = [*np.flatnonzero(np.diff(chosen) != 1).tolist(), len(chosen) - 1]
        start = 0
        for end in ends:  # neighbours in one call
            self._files.write_records(view, int(chosen[start]), kept[start * size : (end + 1) * size])
            start = end + 1
        marks.add(chosen, kept)

    def _hold(self, marks: ViewMarks, block: int) -> bool:
        if not self._claims.claim(marks.view * self._layout.blocks + block):
            return False
        marks.own(block)
        return True

    def _fail(self, name: str, error: OSError) -> NoReturn:
        self._failed = True
        raise StorageError(f"cannot write {self.path / name}: {error.strerror or error}") from error


_KEY_PATTERN = re.compile(r"[0-9a-f]{16}")
_LEFTOVER_PATTERN = re.compile(r"\.[0-9a-f]{16}\.(removed|[0-9a-f]{8}\.new)")
_MIN_KEY_PREFIX = 4  # characters of a key that suffice where no other begins so
_DELETE_ATTEMPTS = 5


@dataclass(frozen=True)
class CacheEntry:
    """A store as it is found in its folder; nothing is checked but the manifest.

    Attributes:
        path: its folder.
        size: bytes on the disk.
        used: when it was last opened, in seconds since 1970.
        manifest: what its records are answers to; None where ``error`` says what is wrong.
        recorded: records that are marked, by view.
        error: why it cannot be used; empty where it can.
    """

    path: Path
    size: int
    used: float
    manifest: CacheManifest | None
    recorded: tuple[int, ...] = ()
    error: str = ""

    @property
    def key(self) -> str:
        """16 hex digits."""
        return self.path.name

    @property
    def share(self) -> float | None:
        """Of the records of all views that the store has, how many are there; None where it has none."""
        if self.manifest is None or not self.recorded:
            return None
        return sum(self.recorded) / (len(self.recorded) * self.manifest.samples)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {"key": self.key, "path": str(self.path), "bytes": self.size, "last_use": self.used}
        if self.manifest is None:
            return found | {"error": self.error}
        manifest, facts = self.manifest, self.manifest.facts
        return found | {
            "samples": manifest.samples,
            "views": len(self.recorded),
            "recorded": list(self.recorded),
            "record": {"kind": manifest.record.kind, "bytes": manifest.record.nbytes, **_record_sizes(manifest.record)},
            "teacher": facts.get("teacher"),
            "folder": facts.get("folder"),
            "data": facts.get("data"),
            "split": manifest.identity.get("split"),
            "error": self.error or None,
        }


def list_caches(root: Path) -> list[CacheEntry]:
    """The stores of a folder, the last used first.

    Raises:
        StorageError: the folder cannot be read.
    """
    return sorted(map(_read_entry, _cache_folders(root)), key=lambda each: (-each.used, each.key))


def find_cache(root: Path, key: str) -> Path:
    """The folder of a store.

    Args:
        root: the folder of all stores.
        key: or its beginning, where no other begins so.

    Raises:
        UsageError: no such store; the message names the nearest.
        StorageError: the folder cannot be read.
    """
    known = [folder.name for folder in _cache_folders(root)]
    found = [name for name in known if name == key or (len(key) >= _MIN_KEY_PREFIX and name.startswith(key))]
    if len(found) == 1:
        return root / found[0]
    if found:
        raise UsageError(f"several stores begin with {key!r}: {', '.join(sorted(found))}")
    raise UsageError(
        f"no teacher cache {key!r} in {root}{did_you_mean(key, known)}\nKnown: {', '.join(sorted(known)) or 'none'}; "
        "`potstill cache ls` shows them"
    )


def remove_cache(path: Path) -> int:
    """Delete a store; one that is damaged too.

    Returns:
        Bytes that were freed.

    Raises:
        StorageError: it is in use, or cannot be deleted.
    """
    claims = BlockLocks(path)  # with a new lock file where a store has none yet: somebody may be about to open it
    try:
        if not claims.acquire_exclusive():
            raise StorageError(f"{path} is in use; wait for the run that uses it, or stop it")
        size = _disk_usage(path)
        gone = path.with_name(f".{path.name}.removed")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(gone)  # what an interrupted removal left
        path.rename(gone)  # at once, for those who look for it
        _delete(gone)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error
    finally:
        claims.release()
    return size


def _delete(folder: Path) -> None:
    for attempt in range(_DELETE_ATTEMPTS):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:  # whoever was about to open the store may just have put a file there
            if error.errno != errno.ENOTEMPTY or attempt == _DELETE_ATTEMPTS - 1:
                raise


def delete_leftovers(root: Path) -> None:
    """Delete what an interrupted removal, or the making of a store, has left."""
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
            marks = (layout.read_mark(block, mark) for block, mark in enumerate(files.read_marks(view)))
            counts.append(sum(int.from_bytes(mark[1].tobytes(), "little").bit_count() for mark in marks if mark))
        return tuple(counts)
    finally:
        files.close()


def _record_sizes(record: RecordFormat) -> dict[str, int]:
    return {"classes": record.classes, "embedding": record.embedding}


def _last_use(path: Path) -> float:
    for name in (path / LOCK, path):
        with contextlib.suppress(OSError):
            return name.stat().st_mtime
    return 0.0


def _disk_usage(path: Path) -> int:
    """Room that is taken on the disk; a file may have holes."""
    found = 0
    with contextlib.suppress(OSError):
        for each in os.scandir(path):
            status = each.stat(follow_symlinks=False)
            found += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return found
