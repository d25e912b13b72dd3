"""Batches of a split: preprocessed images with labels, sample ids and view numbers.

``Loader`` chooses samples and views and reads pixels; ``Collator`` makes the batch of them: views, second images, mixed
images, labels.  ``view_fingerprint``, all that determines the pixels of a view, is part of a teacher cache's key.
"""

import dataclasses
import hashlib
import queue
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.augment import BatchMixer, MixParams, ViewTransform
from potstill.data.concurrency import ProgressReporter, worker_count
from potstill.data.decoded_cache import JPEG_RECORDS, decode_all, decode_squares, jpeg_squares
from potstill.data.image_io import decoder_version
from potstill.data.image_sets import ImageSet, SemiSupervisedSet, decoding_set, set_value_range
from potstill.data.preprocessing import aspect_ratios, decoded_side, decoded_square
from potstill.data.samplers import EpochSampler, Ids, SameClassSampler, SampleOrder
from potstill.data.settings import AugmentSettings
from potstill.data.splits import EpochSampling
from potstill.data.transforms import ViewSize, center_crop, normalize, to_device
from potstill.data.workers import DecodeWorkers
from potstill.errors import DataError, UsageError
from potstill.input_spec import InputSpec
from potstill.types import Batch

GENERATOR = "splitmix64"
VERSION = 2  # of the augmentation; increased with every change that changes a pixel of a view


def view_fingerprint(
    augment: AugmentSettings | None,
    spec: InputSpec,
    *,
    side: int,
    seed: int,
    labels: NDArray[np.int64],
    unlabeled: int,
    balanced: bool,
    strong: bool,
    same_class: bool,
    device: str,
) -> dict[str, Any]:
    """Return JSON values that determine the views of equal images; ``device`` counts for torchvision's policies."""
    augment = augment or AugmentSettings()
    changes = not augment.changes_nothing or strong or same_class
    values: dict[str, Any] = {
        "version": VERSION,
        "decoder": decoder_version(),
        "input": dataclasses.asdict(spec)
        | {"mean": list(spec.mean), "std": list(spec.std), "range": None if spec.range is None else list(spec.range)},
        "side": side,
        "samples": [len(labels), unlabeled],
        "strong": strong,
        "augment": None,
    }
    if changes:
        unused = set() if augment.pad_crop else {"pad_mode"}
        values |= {"augment": augment.model_dump(mode="json", exclude=unused), "generator": GENERATOR, "seed": seed}
    if augment.crop_scale is not None and spec.resize_mode == "crop":
        values["crops_of"] = "whole images"
    if same_class or augment.mixes:
        content = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()
        values["partners"] = {"same class": same_class, "balanced": augment.mixes and balanced, "labels": content}
    if augment.mixes:
        import scipy  # computes the weights of mixed images

        values["scipy"] = scipy.__version__
    if strong or augment.auto_augment != "none":
        import torch
        import torchvision

        values |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "device": device}
    return values


SecondImages = Literal["none", "strong", "same class"]


@dataclass(frozen=True)
class BatchPlan:
    """Samples of a batch, and the random choices for them."""

    ids: Ids  # [B]
    view: Ids | int  # view number, one for all or [B]
    partners: Ids | None = None  # [B] sample ids of partners or second images
    mixing: MixParams | None = None  # how the partners are mixed in
    aspects: NDArray[np.float64] | None = None  # width / height of the images of ``pixel_ids``, if they are stretched

    @property
    def pixel_ids(self) -> Ids:
        """Samples whose pixels are needed, [B] or [2 B]."""
        return self.ids if self.partners is None else np.concatenate([self.ids, self.partners])

    @property
    def pixel_views(self) -> Ids | int:
        """View numbers of ``pixel_ids``, one for all or [B] or [2 B]."""
        twice = self.partners is not None and not isinstance(self.view, int)
        return np.concatenate([self.view, self.view]) if twice else self.view


class Collator:
    """``batch(plan(ids, view), pixels)``; arguments as of ``Loader``, ``side`` that of the squares."""

    def __init__(
        self,
        spec: InputSpec,
        augment: AugmentSettings | None,
        *,
        labels: Ids,
        unlabeled: int,
        side: int,
        seed: int,
        second: SecondImages,
        classes: int | None,
        balanced: bool,
        device: torch.device,
        drawn: ViewSize | None = None,
        answers: Literal["logits", "embeddings"] | None = None,
    ) -> None:
        self.answers = answers
        self.spec, self.augment, self.side, self.seed = spec, augment, side, seed
        self.drawn = drawn or ViewSize(side, spec.size)
        self.labels, self.unlabeled, self.second, self.balanced = labels, unlabeled, second, balanced
        self.device = device
        self.every_label = torch.from_numpy(np.concatenate([labels, np.full(unlabeled, -100)])).to(device)
        self.views = None
        if augment is not None:
            self.views = ViewTransform(augment, size=spec.size, seed=seed, drawn=self.drawn)
        self.strong = self.partners = self.mixer = None
        if second == "strong":
            self.strong = ViewTransform(
                augment or AugmentSettings(), size=spec.size, seed=seed, strong=True, drawn=self.drawn
            )
        elif second == "same class":
            self.partners = SameClassSampler(labels, seed)
        if augment is not None and augment.mixes and classes is not None:
            alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
            self.mixer = BatchMixer(
                labels,
                **alphas,
                classes=classes,
                size=self.drawn.size,
                seed=seed,
                balanced=balanced,
                unlabeled=unlabeled,
            )

    @property
    def distinct_views(self) -> bool:
        """Whether two views of an image differ."""
        return self.second != "none" or not (self.augment is None or self.augment.changes_nothing)

    @property
    def has_partners(self) -> bool:
        """Whether a batch needs the pixels of twice as many samples."""
        return self.mixer is not None or self.partners is not None

    def describe(self, second: bool) -> dict[str, Any]:
        """Return everything that determines a view's pixels besides the images, as ``Loader.describe_views``."""
        if second:
            self._require_second()
        values = view_fingerprint(
            self.augment,
            self.spec,
            side=self.side,
            seed=self.seed,
            labels=self.labels,
            unlabeled=self.unlabeled,
            balanced=self.balanced,
            strong=second and self.second == "strong",
            same_class=second and self.second == "same class",
            device=self.device.type,
        )
        return values if self.drawn == (self.side, self.spec.size) else values | {"drawn": list(self.drawn)}

    def plan(self, ids: Ids, view: Ids | int, *, second: bool = True) -> BatchPlan:
        """Draw the random choices for a batch of these samples; without ``second``, for its first images only."""
        if self.mixer is not None:
            params = self.mixer.draw(ids, view)
            return BatchPlan(ids, view, params.partners, params)
        if self.partners is not None and second:
            return BatchPlan(ids, view, self.partners(ids, view))
        return BatchPlan(ids, view)

    def batch(self, plan: BatchPlan, pixels: Tensor) -> Batch:
        """Return the batch; ``pixels`` are the squares of ``plan.pixel_ids``, uint8 [B or 2 B, *square_shape]."""
        pixels = self._move_to_device(pixels)
        index = to_device(torch.from_numpy(plan.ids), self.device)
        numbers = np.broadcast_to(plan.view, plan.ids.shape).astype(np.int64)
        images, second = self._transform(plan, pixels)
        labels, soft = self.every_label[index], None
        if plan.mixing is not None and self.mixer is not None:
            others = self.every_label[to_device(torch.from_numpy(plan.mixing.partners), self.device)]
            labels, soft = self.mixer.labels(labels, others, plan.mixing)
        view = to_device(torch.from_numpy(numbers), self.device)
        return Batch(images, labels, index, view, second, soft)

    def images(self, plan: BatchPlan, pixels: Tensor) -> Tensor:
        """Return only the batch's first images."""
        return self._transform(plan, self._move_to_device(pixels), strong=False)[0]

    def second_images(self, plan: BatchPlan, pixels: Tensor) -> Tensor:
        """Return only the batch's second images."""
        self._require_second()
        second = self._transform(plan, self._move_to_device(pixels))[1]
        assert second is not None
        return second

    def _transform(self, plan: BatchPlan, pixels: Tensor, *, strong: bool = True) -> tuple[Tensor, Tensor | None]:
        images = self._augment(pixels, plan, self.views)
        count = len(plan.ids)
        if plan.mixing is not None and self.mixer is not None:
            own, others = images[:count], images[count:]
            if self.answers is None:
                return self.mixer.images(own, others, plan.mixing), None
            return self.mixer.answers(own, others, plan.mixing, linear=self.answers == "embeddings"), None
        if plan.partners is not None:
            return images[:count], images[count:]
        if self.strong is not None and strong:
            return images, self._augment(pixels, plan, self.strong)
        return images, None

    def _augment(self, pixels: Tensor, plan: BatchPlan, views: ViewTransform | None) -> Tensor:
        if self.answers is not None:
            return pixels
        if views is None:
            return normalize(center_crop(pixels, self.spec.size), self.spec)
        squares = pixels[..., : self.side, :]
        return normalize(views(squares, plan.pixel_ids, plan.pixel_views, plan.aspects), self.spec)

    def _move_to_device(self, pixels: Tensor) -> Tensor:
        """Copy to the device, from pinned memory so that the CPU need not wait."""
        if self.device.type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()
        return to_device(pixels, self.device)

    def _require_second(self) -> None:
        if self.second == "none":
            raise UsageError('this loader has no second images; create it with second="strong" or "same class"')


class Loader:
    """The batches of one split.

    Order and views, mixed ones too, depend only on seed, epoch and sample id: not on batch size, number of workers,
    device, or whether the pixels fit into memory.

    Args:
        images: N images with labels.
        spec: preprocessing of the network.
        batch_size: labeled images per batch.  In the orders "shuffled" and "balanced", a last batch of a single image
            is dropped (a network with batch normalisation cannot train on it).
        augment: settings of the augmentation; None: images as ``transforms.preprocess`` returns them.
        order: "listed"; "shuffled": a new permutation each epoch; "balanced": N draws with replacement, each class
            equally likely (an image drawn twice in an epoch is seen in the same view).
        seed: of order and views.
        workers: processes that decode if the pixels do not fit into memory; "auto": half of the cores, or all but one
            if the device is a GPU, divided among ``local_processes``.  Fewer, or none, if shared memory does not
            suffice for their batches.
        device: of the batches.
        cache_fraction: of free memory, and of the free disk, that decoded pixels may take.
        local_processes: processes on this machine that load the same images: they share its memory and cores, and one
            file of decoded pixels.
        second: what ``Batch.second`` holds for each sample: "strong", another view with RandAugment; "same class",
            another sample of its class in that sample's own view (itself if the class has no other).
        classes: K; required if images are mixed.
        unlabeled: M further images, in every batch after the labeled ones; they are repeated, each time in a new
            order; their label is -100 and their sample ids are N to N + M - 1.
        unlabeled_share: share of unlabeled images in a batch, at least 0 and below 1.
        views: number of views of an image, used in turn: epoch e has view e modulo ``views``; None: a new one in each
            epoch.
        view_seed: of the views; None: ``seed``.
        identity: identifies the images and their content, for a cache of decoded pixels on disk; None: no such cache.
        progress: receives the progress of decoding.
        draws: length of an epoch, and groups that the order "balanced" uses instead of the classes.
        share: (rank, count) of this process among those that share each batch; each takes every count-th image of a
            batch, or, in the order "listed", every count-th batch, so that outputs are those of a single process.
        answers: [N + M, K, 1, 1] float32, logits of each image that take the place of its pixels, for a teacher that
            is a table: all views of an image have the same, and mixed images have mixed ones.
        embeddings: ``answers`` are embeddings [N + M, D, 1, 1]; those of mixed images are weighted means.
        jpeg: the pixels have been through JPEG, see ``decoded_cache.jpeg_squares``; they are read from its records.
        drawn_for: return the same views as a loader with this spec, at ``spec.size`` and cropped from the original
            pixels, for a teacher of another size than its student.  Both specs have the same ``resize_mode`` and
            ``crop_share``.  Pixels are decoded when the first epoch begins; before, ``view`` decodes its images.

    Attributes:
        processes: number of processes that decode; 0 if all pixels were decoded beforehand.

    Raises:
        UsageError: an unknown order, a batch size below 1, or arguments that exclude each other.
        DataError: no images, or one that cannot be decoded.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        *,
        batch_size: int,
        augment: AugmentSettings | None = None,
        order: SampleOrder = "listed",
        seed: int = 0,
        workers: int | Literal["auto"] = 0,
        device: torch.device | str = "cpu",
        cache_fraction: float = 0.3,
        local_processes: int = 1,
        second: SecondImages = "none",
        classes: int | None = None,
        unlabeled: ImageSet | None = None,
        unlabeled_share: float = 0.5,
        views: int | None = None,
        view_seed: int | None = None,
        identity: str | None = None,
        progress: ProgressReporter | None = None,
        draws: EpochSampling | None = None,
        share: tuple[int, int] = (0, 1),
        jpeg: bool = False,
        drawn_for: InputSpec | None = None,
        answers: Tensor | None = None,
        embeddings: bool = False,
    ) -> None:
        if order not in ("listed", "shuffled", "balanced"):
            raise UsageError(f"order must be listed, shuffled or balanced, got {order!r}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) == 0 or (unlabeled is not None and len(unlabeled) == 0):
            raise DataError("there are no images to load")
        if spec.range is not None:
            for each in (images, unlabeled):
                if each is not None:
                    set_value_range(each, spec.range)
        mixes = augment is not None and augment.mixes
        _check_conflicts(second, mixes, unlabeled is not None, unlabeled_share, classes)
        self.images, self.spec, self.seed = images, spec, seed
        self.views_in_turn, self.view_seed = views, seed if view_seed is None else view_seed
        self.unlabeled, self.second = unlabeled, second
        self.device = torch.device(device)
        random_crops = augment is not None and augment.crop_scale is not None
        # Random crops are cut from the whole image; what is not random is the centre crop, as in prediction.
        self.side, self._resize_mode = decoded_square(spec, random_crops=random_crops)
        self._whole = self._resize_mode == "whole"
        self._aspects: NDArray[np.float64] | None = None
        drawn = None
        if drawn_for is not None:
            drawn = ViewSize(decoded_side(drawn_for, random_crops=random_crops), drawn_for.size)
        self.labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        unlabeled_count = 0 if unlabeled is None else len(unlabeled)
        self.share = share
        _check_sharing(share[1], order, batch_size, len(images))
        self.epochs = EpochSampler(
            self.labels.numpy() if draws is None or draws.groups is None else draws.groups,
            batch_size,
            order,
            seed,
            unlabeled_count,
            unlabeled_share,
            processes=share[1],
            length=None if draws is None else draws.length,
            curriculum=None if draws is None else draws.curriculum,
        )
        if self.epochs.steps == 0:
            raise UsageError(f"{len(images)} images do not fill one batch of {batch_size}: lower the batch size")
        self.collator = Collator(
            spec,
            augment,
            labels=self.labels.numpy(),
            unlabeled=unlabeled_count,
            side=self.side,
            seed=self.view_seed,
            second=second,
            classes=classes,
            balanced=order == "balanced",
            device=self.device,
            drawn=drawn,
            answers=None if answers is None else "embeddings" if embeddings else "logits",
        )
        self._all = images if unlabeled is None else SemiSupervisedSet(images, unlabeled)
        self._pixels: Tensor | None = None
        self._source: ImageSet = self._all  # decoded for each batch if there are no decoded pixels
        self._rows: Ids | None = None  # of the images in the decoded pixels, or the source; None: all, in order
        self._jpeg = jpeg
        self._workers: DecodeWorkers | None = None
        self.processes, self._decoding = 0, answers is not None
        if answers is not None:
            self._pixels = answers.to(self.device)
        self._cache_fraction, self._local_processes = cache_fraction, local_processes
        if workers == "auto":
            workers = worker_count(local_processes, on_gpu=self.device.type == "cuda")
        self._worker_count = workers
        self._identity, self._progress = identity, progress
        if drawn_for is None:
            self._start_decoding()

    @property
    def resident(self) -> bool:
        """Whether all pixels are decoded, in memory or in a memory-mapped file."""
        return self._pixels is not None

    @property
    def count(self) -> int:
        """Images per epoch, including those without labels and those of other processes."""
        return self.epochs.count

    @property
    def steps(self) -> int:
        """Batches per epoch, of this process."""
        return len(range(self.share[0], self.epochs.steps, self.share[1])) if self._listed else self.epochs.steps

    @property
    def common_steps(self) -> int:
        """Smallest number of batches per epoch of any process."""
        return self.epochs.steps // self.share[1] if self._listed else self.epochs.steps

    @property
    def samples(self) -> int:
        """N + M, the number of sample ids."""
        return len(self._all)

    @property
    def distinct_views(self) -> bool:
        """Whether two views of an image differ."""
        return self.collator.distinct_views

    def describe_views(self, second: bool = False) -> dict[str, Any]:
        """Return what determines the pixels of a view (or second image) besides the images, as JSON values."""
        return self.collator.describe(second) | ({"records": JPEG_RECORDS} if self._jpeg else {})

    def ids_of(self, epoch: int) -> list[Ids]:
        """Return the sample ids of each batch of an epoch, int64 [B]; only those of this process."""
        rank, count = self.share
        batches = self.epochs.batches(epoch)
        return batches[rank::count] if self._listed else [ids[rank::count] for ids in batches]

    def sizes_of(self, epoch: int) -> list[int]:
        """Return the sizes of the batches that this process takes part in, over all processes."""
        rank, count = self.share
        sizes = [len(ids) for ids in self.epochs.batches(epoch)]
        return sizes[rank::count] if self._listed else sizes

    def names_at(self, epoch: int, step: int) -> list[str]:
        """Return the names of the images in an epoch's batch number ``step``, from 1, over all processes."""
        return [self._all.names[i] for i in self.epochs.batches(epoch)[step - 1].tolist()]

    @property
    def _listed(self) -> bool:
        return self.epochs.order == "listed"

    def view_of(self, epoch: int) -> int:
        """Return the view number of an epoch; 0 if views do not differ."""
        if not self.distinct_views:
            return 0
        return epoch if self.views_in_turn is None else epoch % self.views_in_turn

    def views_of(self, epoch: int) -> list[int | Ids]:
        """Return the view number of each batch of an epoch, one for all or int64 [B]; only those of this process.

        An unlabeled image has a new view each time that it is seen, as far as ``views_in_turn`` allows.
        """
        view, ids = self.view_of(epoch), self.ids_of(epoch)
        if self.unlabeled is None or not self.distinct_views:
            return [view] * len(ids)
        rank, count = self.share
        views: list[int | Ids] = []
        for passes, batch in zip(self.epochs.unlabeled_passes(epoch), self.epochs.batches(epoch), strict=True):
            theirs = passes if self.views_in_turn is None else passes % self.views_in_turn
            views.append(np.concatenate([np.full(len(batch) - len(passes), view), theirs])[rank::count])
        return views

    def epoch(self, number: int = 0, step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``step`` on, in the views ``views_of(number)``."""
        self._start_decoding()
        batches = list(zip(self.ids_of(number), self.views_of(number), strict=True))
        plans = (self.collator.plan(ids, views) for ids, views in batches[step:])
        for plan, pixels in self._with_pixels(plans):
            yield self.collator.batch(*self._complete(plan, pixels))

    def view(self, index: Tensor, view: int | Tensor) -> Tensor:
        """Return images [B, 3, S, S] of sample ids [B] in a view (one for all or [B]), as an epoch has them."""
        plan = self.collator.plan(*_to_numpy(index, view), second=False)
        return self.collator.images(*self._complete(plan, self._read_pixels(plan.pixel_ids)))

    def second_view(self, index: Tensor, view: int | Tensor) -> Tensor:
        """Return second images as ``view`` returns images; UsageError if this loader has none."""
        plan = self.collator.plan(*_to_numpy(index, view))
        return self.collator.second_images(*self._complete(plan, self._read_pixels(plan.pixel_ids)))

    def _start_decoding(self) -> None:
        """Decode all pixels, or start the processes that decode them."""
        if self._decoding:
            return
        images, rows, identity = decoding_set(self._all, self._identity)
        if self._jpeg:
            self._source, self._rows = (
                jpeg_squares(
                    images,
                    self.side,
                    self._resize_mode,
                    cache_fraction=self._cache_fraction,
                    identity=identity,
                    progress=self._progress,
                ),
                rows,
            )
        else:
            self._pixels = decode_all(
                images,
                self.side,
                self._resize_mode,
                device=self.device,
                cache_fraction=self._cache_fraction,
                processes=self._local_processes,
                identity=identity,
                progress=self._progress,
            )
            self._rows = rows if self._pixels is not None else None
        self._decoding = True
        if self._pixels is not None and self._whole:
            self._aspects = aspect_ratios(self._pixels[:, :1, -1:, :8].cpu().numpy())
        if self._worker_count and self._pixels is None:
            largest_batch = self.epochs.largest_batch * (2 if self.collator.has_partners else 1)
            warn = self._progress.warn if self._progress is not None else warnings.warn
            workers = DecodeWorkers(
                self._source, self.side, self._resize_mode, self._worker_count, batch=largest_batch, warn=warn
            )
            if workers.count:
                self._workers, self.processes = workers, workers.count

    def _with_pixels(self, plans: Iterator[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        if self._workers is None and self._pixels is not None and needs_reading_ahead(self._pixels, self.device):
            yield from self._read_ahead(plans, self._pixels)
            return
        if self._workers is None:
            for plan in plans:
                yield plan, self._read_pixels(plan.pixel_ids)
            return
        epoch = list(plans)
        pixels = self._workers.squares([self._rows_of(plan.pixel_ids).tolist() for plan in epoch])
        yield from zip(epoch, pixels, strict=True)

    def _read_ahead(self, plans: Iterator[BatchPlan], pixels: Tensor) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Read batches ahead in a thread, into pinned buffers: copy a batch before requesting the next one."""
        largest = self.epochs.largest_batch * (2 if self.collator.has_partners else 1)
        on_gpu = self.device.type == "cuda"
        buffers = [
            torch.empty((largest, *pixels.shape[1:]), dtype=pixels.dtype, pin_memory=on_gpu) for _ in range(_BUFFERS)
        ]
        copied = [torch.cuda.Event() if on_gpu else None for _ in buffers]  # type: ignore[no-untyped-call]
        free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        filled: queue.SimpleQueue[tuple[BatchPlan, int] | BaseException | None] = queue.SimpleQueue()
        for number in range(_BUFFERS):
            free.put(number)

        def work() -> None:
            try:
                for plan in plans:
                    number = free.get()
                    if number is None:  # the epoch was left
                        return
                    if (event := copied[number]) is not None:
                        event.synchronize()
                    rows = self._rows_of(plan.pixel_ids)
                    torch.index_select(pixels, 0, torch.from_numpy(rows), out=buffers[number][: len(rows)])
                    filled.put((plan, number))
                filled.put(None)
            except BaseException as error:
                filled.put(error)

        thread = threading.Thread(target=work, name="potstill-read-ahead", daemon=True)
        thread.start()
        try:
            while (found := filled.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                plan, number = found
                yield plan, buffers[number][: len(plan.pixel_ids)]
                if (event := copied[number]) is not None:
                    event.record()
                free.put(number)
        finally:
            free.put(None)
            thread.join()

    def _complete(self, plan: BatchPlan, pixels: Tensor) -> tuple[BatchPlan, Tensor]:
        """Return the plan with the aspect ratios of its images, if these are stretched; and the pixels."""
        if not self._whole or self.collator.answers is not None:
            return plan, pixels
        if self._aspects is None:
            found = aspect_ratios(pixels.numpy())
        else:
            found = self._aspects[self._rows_of(plan.pixel_ids)]
        return dataclasses.replace(plan, aspects=found), pixels

    def _read_pixels(self, ids: Ids) -> Tensor:
        rows = self._rows_of(ids)
        if self._pixels is not None:
            return self._pixels.index_select(0, to_device(torch.from_numpy(rows), self._pixels.device))
        return decode_squares(self._source, rows.tolist(), self.side, self._resize_mode)

    def _rows_of(self, ids: Ids) -> Ids:
        """Return where these samples are in the decoded pixels or the source."""
        return ids if self._rows is None else self._rows[ids]


_BUFFERS = 3  # one is copied to the GPU while the next is ready and another one is filled


def needs_reading_ahead(pixels: Tensor, device: torch.device) -> bool:
    """Return whether the CPU reads pixels for a GPU; a CPU that trains has no core to spare for it."""
    return device.type == "cuda" and pixels.device.type == "cpu"


def _to_numpy(index: Tensor, view: int | Tensor) -> tuple[Ids, Ids | int]:
    return index.cpu().numpy(), view.cpu().numpy() if isinstance(view, Tensor) else view


def _check_sharing(processes: int, order: str, batch_size: int, images: int) -> None:
    if processes == 1 or order == "listed":
        return
    if min(batch_size, images) < 2 * processes:
        raise UsageError(
            f"{processes} processes share each batch, two images or more each: a batch of {min(batch_size, images)} is "
            f"too small; raise training.batch_size to {2 * processes} or more, or start fewer processes"
        )


def _check_conflicts(second: str, mixes: bool, unlabeled: bool, share: float, classes: int | None) -> None:
    if second not in ("none", "strong", "same class"):
        raise UsageError(f"second must be none, strong or same class, got {second!r}")
    if mixes and classes is None:
        raise UsageError("mixup and cutmix need the number of classes: pass classes=")
    if mixes and second != "none":
        raise UsageError("mixed images have no second view: switch mixup and cutmix off, or use kd or dist")
    if unlabeled and second == "same class":
        raise UsageError("unlabeled images have no class, so there is no second image of the same class; use kd")
    if not 0 <= share < 1:
        raise UsageError(f"unlabeled_share must be at least 0 and below 1, got {share:g}")
