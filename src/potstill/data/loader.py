"""Batches of a split: images as a network wants them, with labels, sample ids and view numbers."""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.cores import threads
from potstill.data.draws import uniform, words
from potstill.data.images import ImageSet
from potstill.data.packed import pack, squares
from potstill.data.preprocess import centre, normalise, packed_side
from potstill.data.settings import AugmentSettings
from potstill.data.views import Views
from potstill.data.workers import Workers
from potstill.errors import DataError, UsageError
from potstill.inputs import InputSpec
from potstill.types import Batch

Order = Literal["listed", "shuffled", "balanced"]
Ids = NDArray[np.int64]


class Loader:
    """The batches of one split.

    Order and views depend on seed, epoch and sample id alone: neither on batch size, number of workers, device, nor
    on whether the pixels fit into memory.

    Args:
        images: N images with labels.
        spec: how the network wants its images.
        batch_size: images per batch.  In the orders "shuffled" and "balanced", a last batch of a single image is
            dropped (a network with batch normalisation cannot train on it).
        augment: what views change; None: every image as ``preprocess.prepare`` gives it.
        order: "listed"; "shuffled": a new permutation each epoch; "balanced": N draws with replacement, each class
            equally likely (an image drawn twice in an epoch is seen in the same view).
        seed: of order and views.
        workers: processes that decode, where the pixels do not fit into memory; "auto": half of the cores.
        device: where the batches are wanted.
        memory_share: of free memory that decoded pixels may take.

    Raises:
        UsageError: an unknown order, or a batch size below 1.
        DataError: no images, or one that cannot be decoded.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        *,
        batch_size: int,
        augment: AugmentSettings | None = None,
        order: Order = "listed",
        seed: int = 0,
        workers: int | Literal["auto"] = 0,
        device: torch.device | str = "cpu",
        memory_share: float = 0.3,
    ) -> None:
        if order not in ("listed", "shuffled", "balanced"):
            raise UsageError(f"order must be listed, shuffled or balanced, got {order!r}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) == 0:
            raise DataError("there are no images to load")
        self.images, self.spec, self.batch_size, self.order, self.seed = images, spec, batch_size, order, seed
        self.device = torch.device(device)
        self.side = packed_side(spec, random_crops=augment is not None and augment.crop_scale is not None)
        self.views = Views(augment, size=spec.size, seed=seed) if augment is not None else None
        self.labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        self._packed = pack(images, self.side, spec.fit, device=self.device, memory_share=memory_share)
        processes = max(1, threads() // 2) if workers == "auto" else workers
        self._workers = Workers(images, self.side, spec.fit, processes) if self._packed is None and processes else None

    @property
    def resident(self) -> bool:
        """Whether all pixels are kept in memory."""
        return self._packed is not None

    @property
    def count(self) -> int:
        """Images per epoch."""
        total = len(self.images)
        lonely = self.order != "listed" and total > 1 and total % self.batch_size == 1 and self.batch_size > 1
        return total - 1 if lonely else total

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return math.ceil(self.count / self.batch_size)

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """All batches of an epoch; ``number`` is also the view number of its images.

        Raises:
            DataError: an image that could be decoded before no longer can.
            WorkerError: a process that decodes has died.
        """
        ids = self._ids(number)[: self.count]
        chunks = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
        for chunk, pixels in zip(chunks, self._squares(chunks), strict=True):
            index = torch.from_numpy(chunk)
            view = torch.full_like(index, number)
            yield Batch(
                self._images(pixels, chunk, number),
                self.labels[index].to(self.device),
                index.to(self.device),
                view.to(self.device),
            )

    def view(self, index: Tensor, view: int | Tensor) -> Tensor:
        """Random access: the images [B, 3, S, S] that ``epoch(view)`` gives for these samples.

        Args:
            index: int64 [B], sample ids.
            view: view number of all, or int64 [B].
        """
        ids = index.cpu().numpy()
        numbers = view.cpu().numpy() if isinstance(view, Tensor) else view
        (pixels,) = self._squares([ids], random_access=True)
        return self._images(pixels, ids, numbers)

    def _images(self, pixels: Tensor, ids: Ids, view: Ids | int) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        shown = self.views(pixels, ids, view) if self.views is not None else centre(pixels, self.spec.size)
        return normalise(shown, self.spec)

    def _squares(self, chunks: list[Ids], *, random_access: bool = False) -> Iterator[Tensor]:
        if self._workers is not None and not random_access:
            yield from self._workers.squares([chunk.tolist() for chunk in chunks])
            return
        for chunk in chunks:
            if self._packed is not None:
                yield self._packed.index_select(0, torch.from_numpy(chunk).to(self._packed.device))
            else:
                yield squares(self.images, chunk.tolist(), self.side, self.spec.fit)

    def _ids(self, epoch: int) -> Ids:
        total = len(self.images)
        everyone = np.arange(total, dtype=np.int64)
        if self.order == "shuffled":
            return np.argsort(words(self.seed, "order", everyone, epoch), kind="stable")
        if self.order == "balanced":
            return self._balanced(everyone, epoch)
        return everyone

    def _balanced(self, slots: Ids, epoch: int) -> Ids:
        labels = self.labels.numpy()
        present, counts = np.unique(labels, return_counts=True)
        grouped = np.argsort(labels, kind="stable")
        drawn = (uniform(self.seed, "balanced class", slots, epoch) * len(present)).astype(np.int64)
        place = (uniform(self.seed, "balanced image", slots, epoch) * counts[drawn]).astype(np.int64)
        starts = np.cumsum(counts) - counts
        ids: Ids = grouped[starts[drawn] + place]
        return ids
