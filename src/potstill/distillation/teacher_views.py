"""Images for teachers of another input size than the student's: the same views, cropped from the original pixels."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from potstill.types import Batch

if TYPE_CHECKING:
    from potstill.data.loader import Loader


class TeacherImages(NamedTuple):
    """For each teacher its images of a batch, [B, 3, S, S], prepared for it; None: the student's images, converted."""

    images: tuple[Tensor | None, ...]
    second: tuple[Tensor | None, ...]


class TeacherViews:
    """The images of a split's batches for teachers of other sizes, in step with the student's loader.

    They are decoded on request, so that cached outputs cost no decoding.

    Args:
        loaders: for each teacher one with the order and the views of the student's loader, at the teacher's size (see
            ``drawn_for`` of ``Loader``); None if it has the student's size.
        memory_format: of the images.
    """

    def __init__(
        self, loaders: Sequence["Loader | None"], memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.loaders, self.memory_format = tuple(loaders), memory_format
        self._epoch, self._position = 0, -1
        self._batches: dict[Loader, Iterator[Batch]] = {}
        self._last: TeacherImages | None = None

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Start the epoch at its batch number ``step``, from 0."""
        self._batches.clear()
        self._epoch, self._position, self._last = epoch, step - 2, None  # no batch is the next one

    def at(self, position: int, index: Tensor, view: int | Tensor) -> TeacherImages:
        """Return the images of the epoch's batch number ``position``, from 0; positions must increase.

        The batch after the last one comes from the loader's epoch, which decodes ahead; any other is decoded alone.

        Args:
            position: of the batch in this process's part of the epoch.
            index: [B] int64 sample ids.
            view: view number, one for all or [B] int64.
        """
        if position != self._position or self._last is None:
            is_next = position == self._position + 1
            if not is_next:
                self._batches.clear()
            batches = {
                loader: self._load(loader, position, index, view, is_next)
                for loader in dict.fromkeys(self.loaders)
                if loader is not None
            }
            pairs = [(None, None) if loader is None else batches[loader] for loader in self.loaders]
            self._last = TeacherImages(tuple(images for images, _ in pairs), tuple(second for _, second in pairs))
            self._position = position
        return self._last

    def of(self, position: int, batch: Batch) -> TeacherImages:
        """Return the images of the student's batch number ``position``."""
        assert batch.index is not None  # a Loader gives them
        assert batch.view is not None
        return self.at(position, batch.index, batch.view)

    def _load(
        self, loader: "Loader", position: int, index: Tensor, view: int | Tensor, is_next: bool
    ) -> tuple[Tensor, Tensor | None]:
        if is_next:
            if loader not in self._batches:
                self._batches[loader] = loader.epoch(self._epoch, position)
            batch = next(self._batches[loader])
            images, second = batch.images, batch.second
        else:
            images = loader.view(index, view)
            second = None if loader.second == "none" else loader.second_view(index, view)
        return self._to_memory_format(images), None if second is None else self._to_memory_format(second)

    def _to_memory_format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)
