"""Teacher outputs read from the cache; what is missing is computed, written to the cache and then used as it was
written.

So the first epochs, in which the teacher runs, and all later ones train on the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.distillation.distiller import Distiller
from potstill.distillation.feature_extractor import ForwardOutput
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.distillation.teacher_views import TeacherViews
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import ArtifactError, StorageError
from potstill.types import Batch, Outputs

Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]


_PendingRecords = tuple[int, int, Ids, Bytes]  # which store, view, sample ids [B], records [B, nbytes]


class TeacherCacheProtocol(Protocol):
    """The part of a ``Store`` that is needed here."""

    record: RecordFormat

    def read(self, view: int, ids: Ids) -> tuple[Bytes, NDArray[np.bool_]]: ...

    def write(self, view: int, ids: Ids, records: Bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def coverage(self, views: int | None = None) -> list[int]: ...


class NullTeacherCache:
    """A shelf that keeps nothing: every answer is asked anew, and rounded as its record would be."""

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


class SampleSchedule(Protocol):
    """The part of a ``Loader`` that is needed here: which samples come in which view."""

    def ids_of(self, epoch: int) -> list[Ids]: ...

    def view_of(self, epoch: int) -> int: ...


@dataclass
class CacheCounts:
    """Images of which the teacher was asked, and whose answers were read."""

    asked: int = 0
    read: int = 0


class CachedTeacherOutputs:
    """Answers for the batches of one split, in the order of its loader.

    Args:
        distiller: whose teachers are asked for what is missing.
        loader: of the split; tells beforehand which samples come, so that nobody waits for a device to say so.
        shelves: a store for each teacher; for the second images too where the method needs such.
        autocast: in which the teachers are asked.
        warn: is told once if the stores fail; training then goes on with the live teachers, whose answers are rounded
            as before.
        training: whether these are the training images, whom a cross-fitted teacher answers by the head of their fold.
        processes: that share each batch.  One of each machine records what all of them asked, whenever it is to last;
            each uses at once what it asked itself.
        views: the images of the split for teachers of another size than the student's; None: there are none such.
    """

    def __init__(
        self,
        distiller: Distiller,
        loader: SampleSchedule,
        caches: Sequence[TeacherCacheProtocol],
        second: Sequence[TeacherCacheProtocol] = (),
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
        self.caches: list[TeacherCacheProtocol] = list(caches)
        self.second: list[TeacherCacheProtocol] = list(second)
        self.processes = processes
        self.counts = CacheCounts()
        self.broken = any(isinstance(shelf, NullTeacherCache) for shelf in self.caches)  # nothing is kept
        self._upcoming_ids: Iterator[Ids] = iter(())
        self._view, self._position = 0, -1
        self._told: list[_PendingRecords] = []  # what this process has asked and nobody has recorded yet

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """The batches of this epoch come next, the first ``step`` of them left out."""
        self._upcoming_ids, self._view = iter(self.loader.ids_of(epoch)[step:]), self.loader.view_of(epoch)
        self._position = step - 1
        if self.views is not None:
            self.views.start_epoch(epoch, step)

    def __call__(self, batch: Batch) -> Outputs:
        """The teacher's outputs for the next batch."""
        ids = next(self._upcoming_ids)
        self._position += 1
        assert len(ids) == len(batch)  # the loader's own order
        try:
            return self._answer(ids, batch)
        except (StorageError, ArtifactError) as error:
            self._fall_back(error)
            return self._answer(ids, batch)

    def flush(self) -> None:
        """Make what has been recorded last; all processes at the same time."""
        if self.processes.several:
            told = [each for one in self.processes.gather(self._told) for each in one]
            self._told = []
            if self.processes.local_rank == 0:
                self._record(told)
        if not self.broken:
            try:
                for shelf in (*self.caches, *self.second):
                    shelf.flush()
            except (StorageError, ArtifactError) as error:
                self._fall_back(error)
        self.processes.highest(0)  # nobody reads on before all is there

    def close(self) -> None:
        """Let others write.  All lasts but what several processes have asked since they last called ``flush``."""
        for shelf in (*self.caches, *self.second):
            try:
                shelf.close()
            except (StorageError, ArtifactError) as error:
                self._fall_back(error)

    @torch.no_grad()
    def _answer(self, ids: Ids, batch: Batch) -> Outputs:
        said = self._said(self.caches, ids, batch.images)
        second = self._said(self.second, ids, batch.second) if self.second and batch.second is not None else None
        return self.distiller.teacher_outputs(said, second)

    def _said(self, caches: Sequence[TeacherCacheProtocol], ids: Ids, images: Tensor) -> list[ForwardOutput]:
        teachers = self.distiller.teacher
        assert teachers is not None  # or nobody would have made stores
        known = [shelf.read(self._view, ids) for shelf in caches]
        missing = ~np.logical_and.reduce([present for _, present in known])
        if missing.any():
            own: tuple[Tensor | None, ...] = ()
            if self.views is not None:
                found = self.views.at(self._position, torch.from_numpy(ids), self._view)
                own = found.second if caches is self.second else found.images
            with self.autocast():
                index = torch.from_numpy(ids).to(images.device, non_blocking=True) if self.training else None
                fresh = teachers.ask(images, own, index)
            self.counts.asked += len(ids)
            for place, (shelf, (records, present), said) in enumerate(zip(caches, known, fresh, strict=True)):
                features = None if said.embedding is None else _to_numpy(said.embedding)
                told = shelf.record.encode(_to_numpy(said.logits), features)
                records[~present] = told[~present]
                if self.processes.several and not self.broken:
                    which = place + (len(self.caches) if caches is self.second else 0)
                    self._told.append((which, self._view, ids[~present], told[~present]))
                else:
                    shelf.write(self._view, ids[~present], told[~present])
        else:
            self.counts.read += len(ids)
        temperature = self.distiller.method.soft_temperature
        outputs = []
        for shelf, (records, _), network, reader in zip(
            caches, known, teachers.networks, teachers.readers, strict=True
        ):
            logits, embedded = shelf.record.decode(records, temperature)
            embedding = None if embedded is None else _to_device(embedded, images.device)
            outputs.append(
                ForwardOutput(_to_device(logits, images.device), embedding=embedding, head=reader.head(network))
            )
        return outputs

    def _record(self, told: Sequence[_PendingRecords]) -> None:
        """Write what all processes asked."""
        if self.broken:
            return
        try:
            for which, view, ids, records in told:
                (*self.caches, *self.second)[which].write(view, ids, records)
        except (StorageError, ArtifactError) as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        if not self.broken:
            self.broken, self._told = True, []
            for shelf in (*self.caches, *self.second):
                with contextlib.suppress(StorageError, ArtifactError):
                    shelf.close()
            self.caches = [NullTeacherCache(shelf.record) for shelf in self.caches]
            self.second = [NullTeacherCache(shelf.record) for shelf in self.second]
            self.warn(f"the store of teacher outputs cannot be used, so the teacher is asked in every step: {error}")


def _to_numpy(values: Tensor) -> NDArray[np.float32]:
    return values.detach().float().cpu().numpy()


def _to_device(values: NDArray[np.float32], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
