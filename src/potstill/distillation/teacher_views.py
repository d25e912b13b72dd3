"""What teachers of another input size than their student's see: the student's views, cut from the original pixels."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from potstill.types import Batch

if TYPE_CHECKING:
    from potstill.data.loader import Loader


class TeacherImages(NamedTuple):
    """For each teacher its images of a batch, [B, 3, S, S] prepared for it; None: it takes the student's, converted."""

    images: tuple[Tensor | None, ...]
    second: tuple[Tensor | None, ...]


class TeacherViews:
    """The images of a split's batches for teachers of other sizes, in step with the student's loader.

    They are made when they are asked for, so that outputs which are cached cost no decoding.

    Args:
        loaders: for each teacher one with the order and the views of the student's loader, at the teacher's size (see
            ``drawn_for`` of ``Loader``); None where it has the student's size.
        memory_format: of the images.
    """

    def __init__(
        self, loaders: Sequence["Loader | None"], memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.loaders, self.memory_format = tuple(loaders), memory_format
        self._epoch, self._position = 0, -1
        self._running: dict[Loader, Iterator[Batch]] = {}
        self._last: TeacherImages | None = None

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """The batches of this epoch come next, the first ``step`` of them left out."""
        self._running.clear()
        self._epoch, self._position, self._last = epoch, step - 2, None  # so that no batch follows upon another

    def at(self, position: int, index: Tensor, view: int | Tensor) -> TeacherImages:
        """The images of an epoch's batch number ``position``, from 0; positions only go up.

        A batch that follows upon the last one comes from the loader's epoch, which decodes ahead; another one is
        decoded alone.

        Args:
            position: of the batch in this process's share of the epoch.
            index: int64 [B], its sample ids.
            view: its view number, one for all or int64 [B].
        """
        if position != self._position or self._last is None:
            follows = position == self._position + 1
            if not follows:
                self._running.clear()
            found = {
                loader: self._next(loader, position, index, view, follows)
                for loader in dict.fromkeys(self.loaders)
                if loader is not None
            }
            each = [(None, None) if loader is None else found[loader] for loader in self.loaders]
            self._last = TeacherImages(tuple(images for images, _ in each), tuple(second for _, second in each))
            self._position = position
        return self._last

    def of(self, position: int, batch: Batch) -> TeacherImages:
        """The images of the student's batch number ``position``."""
        assert batch.index is not None  # a Loader gives them
        assert batch.view is not None
        return self.at(position, batch.index, batch.view)

    def _next(
        self, loader: "Loader", position: int, index: Tensor, view: int | Tensor, follows: bool
    ) -> tuple[Tensor, Tensor | None]:
        if follows:
            if loader not in self._running:
                self._running[loader] = loader.epoch(self._epoch, position)
            batch = next(self._running[loader])
            images, second = batch.images, batch.second
        else:
            images = loader.view(index, view)
            second = None if loader.second == "none" else loader.second_view(index, view)
        return self._laid_out(images), None if second is None else self._laid_out(second)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)
