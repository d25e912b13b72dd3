"""A store: what one teacher said of the views of one split's images, on disk.  No torch here.

``<root>/<key>/`` holds ``manifest.json`` (what the records are answers to), ``logits.bin`` (the records), ``done.bin``
(which of them are there, with checksums) and ``lock`` (who writes where).  Any number of processes may read and write
one store at once; each block of records is written by one of them.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ArtifactError, StorageError
from potstill.store.claims import Claims
from potstill.store.files import MARKS, RECORDS, Files
from potstill.store.layout import BLOCK, Ids, Layout
from potstill.store.manifest import NAME, Manifest, canonical
from potstill.store.marks import Marks
from potstill.store.records import Bytes, Record

_ATTEMPTS = 40  # of 0.05 s each, while another process removes the store


class Store:
    """An open store; ``open`` or ``existing`` makes one.

    Attributes:
        path: its folder.
        identity: what the records are answers to.
        facts: more about it, for people.
        record: how answers become bytes.
        samples: N.
    """

    def __init__(self, path: Path, manifest: Manifest, claims: Claims) -> None:
        self.path, self._claims = path, claims
        self.identity, self.facts = manifest.identity, manifest.facts
        self.record, self.samples = manifest.record, manifest.samples
        self._layout = Layout.of(manifest)
        self._known: dict[int, Marks] = {}
        self._failed = self._closed = False
        try:
            self._files = Files(path, self._layout)
        except OSError as error:
            claims.release()
            raise StorageError(f"cannot open {error.filename or path}: {error.strerror or error}") from error
        with contextlib.suppress(OSError):
            os.utime(claims.path)  # its time is that of the last use

    @classmethod
    def open(
        cls, root: Path, identity: Mapping[str, Any], record: Record, samples: int, facts: Mapping[str, Any]
    ) -> "Store":
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
        manifest = Manifest(json.loads(canonical(identity)), record, samples, facts)
        return cls._opened(root / manifest.key, manifest)

    @classmethod
    def existing(cls, path: Path) -> "Store":
        """The store in this folder.

        Raises:
            StorageError: it cannot be opened here.
            ArtifactError: there is none, it is damaged, or of another version's format.
        """
        return cls._opened(path, None)

    @classmethod
    def _opened(cls, path: Path, new: Manifest | None) -> "Store":
        for attempt in range(_ATTEMPTS):
            try:
                if new is not None and not (path / NAME).exists():
                    new.write(path)
                manifest = Manifest.read(path)
                claims = Claims(path)
                if claims.use():
                    return cls(path, manifest, claims)
                claims.release()
            except OSError as error:
                raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
            except (StorageError, ArtifactError) as error:
                # A folder may be moved away between any two of the calls above.
                gone = new is not None and isinstance(error.__cause__, FileNotFoundError)
                if not gone or attempt == _ATTEMPTS - 1:
                    raise
            time.sleep(0.05)
        raise StorageError(f"{path} is being removed by another process; try again, or see `potstill store ls`")

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
            self._fail(RECORDS, error)

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
            self._fail(MARKS, error)

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

    def _marks(self, view: int, ids: Ids) -> Marks:
        if view < 0 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.samples):
            raise IndexError(f"a store of {self.samples} samples, asked for view {view} of samples {ids}")
        if view not in self._known:
            self._known[view] = Marks(self._layout, self._files, view)
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
        self._files.reserve(view, self._claims.growing)
        chosen, kept = ids[order], np.ascontiguousarray(records[order]).reshape(-1).data
        size = self.record.nbytes
        ends = [*np.flatnonzero(np.diff(chosen) != 1).tolist(), len(chosen) - 1]
        start = 0
        for end in ends:  # neighbours in one call
            self._files.write_records(view, int(chosen[start]), kept[start * size : (end + 1) * size])
            start = end + 1
        marks.add(chosen, kept)

    def _hold(self, marks: Marks, block: int) -> bool:
        if not self._claims.claim(marks.view * self._layout.blocks + block):
            return False
        marks.own(block)
        return True

    def _fail(self, name: str, error: OSError) -> NoReturn:
        self._failed = True
        raise StorageError(f"cannot write {self.path / name}: {error.strerror or error}") from error
