"""Teacher outputs read from the cache; missing ones are computed, written to the cache, and used as encoded there.

So the first epochs, in which the teacher runs, and all later ones train on the same values.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.distillation.teachers import ForwardOutput, Teachers, TeacherViews
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import ArtifactError, StorageError
from potstill.types import Batch, Outputs

if TYPE_CHECKING:
    from potstill.data.loader import Loader

Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]


_PendingRecords = tuple[int, int, Ids, Bytes]  # position of the cache, view, sample ids [B], records [B, nbytes]


class NullTeacherCache:
    """A cache that stores nothing: the teacher always runs, and its outputs are rounded as records would be."""

    def __init__(self, record: RecordFormat) -> None:
        self.record = record

    def read(self, view: int, ids: Ids) -> tuple[Bytes, NDArray[np.bool_]]:
        return np.zeros((len(ids), self.record.nbytes), np.uint8), np.zeros(len(ids), bool)

    def write(self, view: int, ids: Ids, records: Bytes) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def coverage(self, views: int | None = None) -> list[int]:
        return [0] * (views or 0)


AnyTeacherCache = TeacherCache | NullTeacherCache


@dataclass
class CacheCounts:
    """Number of images whose teacher outputs were computed, and read from the cache."""

    computed: int = 0
    read: int = 0


class CachedTeacherOutputs:
    """Teacher outputs for the batches of one split, in the order of its loader.

    ``caches`` and ``second`` (for second images) have one cache for each teacher.  If a cache fails, ``warn`` is called
    once, and training goes on with the teachers, whose outputs are rounded as before.  Each of the ``processes`` that
    share a batch uses its own outputs at once; one on each machine writes those of all at ``flush``.
    """

    def __init__(
        self,
        distiller: Distiller,
        loader: "Loader",
        caches: Sequence[AnyTeacherCache],
        second: Sequence[AnyTeacherCache] = (),
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        warn: Callable[[str], None],
        training: bool = False,
        processes: ProcessGroup = SINGLE_PROCESS,
        views: TeacherViews | None = None,
    ) -> None:
        self.training = training
        self.distiller, self.loader, self.autocast, self.warn = distiller, loader, autocast, warn
        self.views = views
        self.caches: list[AnyTeacherCache] = list(caches)
        self.second: list[AnyTeacherCache] = list(second)
        self.processes = processes
        self.counts = CacheCounts()
        self.disabled = any(isinstance(cache, NullTeacherCache) for cache in self.caches)
        self._upcoming: Iterator[tuple[Ids, int | Ids]] = iter(())
        self._views: int | Ids = 0  # of the batch: one for all or [B]
        self._position = -1
        self._temperature: float | None = None  # at which the method reads the logits
        self._pending: list[_PendingRecords] = []  # computed by this process, not written yet

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Start the epoch at its batch number ``step``, from 0."""
        batches = list(zip(self.loader.ids_of(epoch), self.loader.views_of(epoch), strict=True))
        self._upcoming = iter(batches[step:])
        self._temperature = self.distiller.method.soft_temperature
        self._position = step - 1
        if self.views is not None:
            self.views.start_epoch(epoch, step)

    def __call__(self, batch: Batch) -> Outputs:
        """Return the teachers' outputs for the next batch."""
        ids, self._views = next(self._upcoming)
        self._position += 1
        assert len(ids) == len(batch.labels)  # the loader's own order
        try:
            return self._teacher_outputs(ids, batch)
        except (StorageError, ArtifactError) as error:
            self._fall_back(error)
            return self._teacher_outputs(ids, batch)

    def flush(self) -> None:
        """Write records to disk; called by all processes at the same time."""
        if self.processes.several:
            pending = [records for each in self.processes.gather(self._pending) for records in each]
            self._pending = []
            if self.processes.local_rank == 0:
                self._write(pending)
        if not self.disabled:
            try:
                for cache in (*self.caches, *self.second):
                    cache.flush()
            except (StorageError, ArtifactError) as error:
                self._fall_back(error)
        self.processes.highest(0)  # a barrier: no process reads before everything is written

    def close(self) -> None:
        """Close the caches, so that other processes may write.  Several processes call ``flush`` before."""
        for cache in (*self.caches, *self.second):
            try:
                cache.close()
            except (StorageError, ArtifactError) as error:
                self._fall_back(error)

    @torch.no_grad()
    def _teacher_outputs(self, ids: Ids, batch: Batch) -> Outputs:
        teachers, outputs = self.distiller.teacher, self._read_or_compute(self.caches, ids, batch.images)
        assert teachers is not None  # caches are opened only for methods with a teacher
        second = None
        if self.second and batch.second is not None:
            second = self._read_or_compute(self.second, ids, batch.second)
        return self.distiller.router.teacher_outputs(teachers, outputs, second)

    def _read_or_compute(self, caches: Sequence[AnyTeacherCache], ids: Ids, images: Tensor) -> list[ForwardOutput]:
        teachers = self.distiller.teacher
        assert teachers is not None  # caches are opened only for methods with a teacher
        read = [_read(cache, self._views, ids) for cache in caches]
        if all(present.all() for _, present in read):
            self.counts.read += len(ids)
        else:
            self._compute_missing(caches, read, ids, images, teachers)
            self.counts.computed += len(ids)
        outputs = []
        for cache, (records, _), network, extractor in zip(
            caches, read, teachers.networks, teachers.extractors, strict=True
        ):
            logits, embedded = cache.record.decode(records, self._temperature)
            embedding = None if embedded is None else _to_device(embedded, images.device)
            outputs.append(
                ForwardOutput(
                    _to_device(logits, images.device),
                    embedding=embedding,
                    head=extractor.head(network),
                )
            )
        return outputs

    def _compute_missing(
        self,
        caches: Sequence[AnyTeacherCache],
        read: Sequence[tuple[Bytes, NDArray[np.bool_]]],
        ids: Ids,
        images: Tensor,
        teachers: Teachers,
    ) -> None:
        """Run the teachers, complete the records in ``read``, and write those that were missing."""
        prepared: tuple[Tensor | None, ...] = ()
        if self.views is not None:
            view = self._views if isinstance(self._views, int) else torch.from_numpy(self._views)
            teacher_images = self.views.at(self._position, torch.from_numpy(ids), view)
            prepared = teacher_images.second if caches is self.second else teacher_images.images
        with self.autocast():
            index = _to_device(ids, images.device) if self.training else None
            outputs = teachers.run(images, prepared, index)
        for teacher, (cache, (records, present), output) in enumerate(zip(caches, read, outputs, strict=True)):
            embedding = None if output.embedding is None else _to_numpy(output.embedding)
            encoded = cache.record.encode(_to_numpy(output.logits), embedding)
            records[~present] = encoded[~present]
            for view, rows in _rows_by_view(self._views, len(ids)):
                rows = rows[~present[rows]]
                if not len(rows):
                    continue
                if self.processes.several and not self.disabled:
                    position = teacher + (len(self.caches) if caches is self.second else 0)
                    self._pending.append((position, view, ids[rows], encoded[rows]))
                else:
                    cache.write(view, ids[rows], encoded[rows])

    def _write(self, pending: Sequence[_PendingRecords]) -> None:
        if self.disabled:
            return
        try:
            for position, view, ids, records in pending:
                (*self.caches, *self.second)[position].write(view, ids, records)
        except (StorageError, ArtifactError) as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        if not self.disabled:
            self.disabled, self._pending = True, []
            for cache in (*self.caches, *self.second):
                with contextlib.suppress(StorageError, ArtifactError):
                    cache.close()
            self.caches = [NullTeacherCache(cache.record) for cache in self.caches]
            self.second = [NullTeacherCache(cache.record) for cache in self.second]
            self.warn(f"the teacher cache cannot be used, so the teacher runs in every step: {error}")


def _rows_by_view(views: int | Ids, count: int) -> list[tuple[int, Ids]]:
    """Return each view number of a batch with the positions of its images."""
    if isinstance(views, int):
        return [(views, np.arange(count))]
    return [(int(view), np.flatnonzero(views == view)) for view in np.unique(views)]


def _read(cache: AnyTeacherCache, views: int | Ids, ids: Ids) -> tuple[Bytes, NDArray[np.bool_]]:
    """Read the records of a batch; as ``TeacherCache.read`` of one view."""
    if isinstance(views, int):
        return cache.read(views, ids)
    records, present = np.zeros((len(ids), cache.record.nbytes), np.uint8), np.zeros(len(ids), bool)
    for view, rows in _rows_by_view(views, len(ids)):
        records[rows], present[rows] = cache.read(view, ids[rows])
    return records, present


def _to_numpy(values: Tensor) -> NDArray[np.float32]:
    return values.detach().float().cpu().numpy()


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    # Only CUDA has read the memory when the call returns; MPS reads it later.
    return torch.from_numpy(values).to(device, non_blocking=device.type == "cuda")
