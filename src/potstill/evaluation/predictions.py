"""What a network predicts for every image of a split, in memory of O(N) where N x K is large.

Up to ``MOST`` numbers all probabilities are held.  Above that, what the figures need of each image is computed batch by
batch, AUC comes from bins, and the probabilities themselves go, where they are wanted later, into a file of float16.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from potstill.artifacts import PART, move
from potstill.errors import DataError, NonFiniteError, StorageError, UsageError
from potstill.evaluation.auc import exact_auc_per_class
from potstill.evaluation.averages import Array
from potstill.evaluation.evaluate import Listing, check_complete, collect, evaluating
from potstill.evaluation.metrics import StreamingMetrics
from potstill.processes.group import ALONE, Processes

MOST_SCORES = 100_000_000  # N * K up to which scores are sorted for AUC; beyond that it comes from bins
MOST = 10_000_000  # N * K up to which all probabilities are held and written
TOP = 5  # classes of each image that are kept above that
_BLOCK = 4_000_000  # numbers that are in memory at once
_LOWEST = -60_000.0  # logarithm of a probability, in the range of float16


class Rows(Protocol):
    """Probabilities [N, K] that are read in blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Consecutive rows, and which they are; the blocks depend on the shape alone."""


@dataclass(frozen=True)
class Held:
    """Rows of an array."""

    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.array.shape[0], self.array.shape[1]

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Views of the array."""
        for rows in _slices(self.shape):
            yield rows, self.array[rows]


@dataclass(frozen=True)
class Stored:
    """Rows of a NumPy file of float16 that holds the logarithms of probabilities: of those, a float16 has three digits
    however small they are.
    """

    path: Path
    shape: tuple[int, int]

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Rows as they are read; a memory map would count as memory of this process."""
        count, classes = self.shape
        try:
            with self.path.open("rb") as file:
                file.seek(-2 * count * classes, os.SEEK_END)  # behind the header of the NumPy format
                for rows in _slices(self.shape):
                    logs = np.fromfile(file, np.float16, (rows.stop - rows.start) * classes)
                    yield rows, np.exp(logs.reshape(-1, classes).astype(np.float32))
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self.path}: {error}") from error


@dataclass(frozen=True)
class Predictions:
    """What is known of each image; row i is image i.

    Attributes:
        labels: [N] int64.
        predicted: [N] int64, the most probable class; of equally probable ones the first.
        confidence: [N], its probability.
        of_label: [N], probability of the label.
        before: [N] int64, classes that come before the label: 0 where it is the most probable.
        top, top_probabilities: [N, min(K, TOP)], the most probable classes in order, and their probabilities.
        areas, area: AUC of each class [K] (NaN: undefined), and of all classes pooled.
        rows: all probabilities; None where they were not kept.
    """

    labels: Array
    predicted: Array
    confidence: Array
    of_label: Array
    before: Array
    top: Array
    top_probabilities: Array
    areas: Array
    area: float
    rows: Rows | None

    @property
    def classes(self) -> int:
        """K."""
        return len(self.areas)

    @property
    def array(self) -> Array | None:
        """[N, K] probabilities, where they are held."""
        return self.rows.array if isinstance(self.rows, Held) else None

    @property
    def correct(self) -> Array:
        """[N] bool."""
        return np.asarray(self.predicted == self.labels)

    def confusion(self) -> tuple[Array, Array, Array]:
        """True class, predicted class and number of images, of each pair of classes that has any; by class."""
        cells, images = np.unique(self.labels * self.classes + self.predicted, return_counts=True)
        return cells // self.classes, cells % self.classes, images

    @classmethod
    def of(cls, rows: "Rows | Array", labels: Array) -> "Predictions":
        """From probabilities [N, K] and labels [N] int64 in [0, K).

        Raises:
            UsageError: labels that do not fit.
            NonFiniteError: a probability is NaN or infinite.
        """
        rows = Held(rows) if isinstance(rows, np.ndarray) else rows
        count, classes = rows.shape
        if labels.shape != (count,) or (count and not 0 <= labels.min() <= labels.max() < classes):
            raise UsageError(f"probabilities [{count}, {classes}] need as many labels from 0 to {classes - 1}")
        real = rows.array.dtype if isinstance(rows, Held) else np.dtype(np.float64)
        columns = _Columns(count, classes, "cpu", torch.float32 if real == np.float32 else torch.float64)
        exact = isinstance(rows, Held) and count * classes <= MOST_SCORES
        metrics = None if exact else StreamingMetrics(classes)
        smallest = float(np.finfo(np.float32).tiny)  # the logarithm of a probability that was rounded to 0 stays finite
        for which, block in rows.blocks():
            found, known = torch.from_numpy(np.ascontiguousarray(block)), torch.from_numpy(labels[which])
            finite = found.isfinite().all(dim=1)
            if not bool(finite.all()):
                image = which.start + int((~finite).nonzero()[0, 0])
                raise NonFiniteError(f"a probability of image {image} is NaN or infinite")
            columns.add(found, known, torch.arange(which.start, which.stop), finite)
            if metrics is not None:
                metrics.update(found.clamp(min=smallest).log(), known)
        if isinstance(rows, Held) and exact:
            areas, area = exact_auc_per_class(rows.array, labels) if count else (np.full(classes, np.nan), np.nan)
        else:
            assert metrics is not None
            areas, area = metrics.areas()
        predicted, confidence, of_label, before, top, top_probabilities, *_ = columns.arrays()
        return cls(labels, predicted, confidence, of_label, before, top, top_probabilities, areas, float(area), rows)


def predict_split(
    model: nn.Module,
    loader: Listing,
    *,
    classes: int,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
    name_of: Callable[[int], str] | None = None,
    file: Path | None = None,
    labels: Array | None = None,
    most: int = MOST,
) -> Predictions:
    """Run ``model`` once on every image that ``loader`` lists, in eval mode, in float32 and without gradients.

    Args:
        model: images [B, 3, S, S] -> logits [B, classes]; already on ``device``.
        loader: in listed order, without augmentation.
        classes: K.
        device: where the model is.
        processes: each of them has some of the batches; all get the same result.
        name_of: of an image, for messages.
        file: where all probabilities go, as ``Stored`` describes, if there are more than ``most``; None: nowhere.
        labels: [N] int64, in place of those that the loader gives.
        most: N * K up to which all probabilities are held instead.

    Raises:
        NonFiniteError: a logit is NaN or infinite; names the first such image.
        DataError: an image was left out or came twice.
        UsageError: logits of a wrong shape.
        StorageError: the file cannot be written.
    """
    count = loader.count
    if count * classes <= most:
        probabilities, own_labels, _ = collect(
            model, loader, classes=classes, device=device, processes=processes, names=name_of
        )
        return Predictions.of(probabilities, own_labels if labels is None else labels)
    columns, metrics = _Columns(count, classes, device), StreamingMetrics(classes, device=device)
    given = torch.from_numpy(np.zeros(0, np.int64) if labels is None else labels).to(device)
    with evaluating(model), _Writing(file, (count, classes), processes) as writing:
        for batch in loader.epoch():
            if batch.index is None:
                raise UsageError("to evaluate, the loader must number its images (Batch.index)")
            logits = model(batch.images)
            if logits.shape != (len(batch), classes):
                wanted = [len(batch), classes]
                raise UsageError(f"{type(model).__name__} must return logits {wanted}, got {list(logits.shape)}")
            logits = logits.float()
            logs = logits.log_softmax(dim=1)
            known = batch.labels if labels is None else given[batch.index]
            columns.add(logs.exp(), known, batch.index, logits.isfinite().all(dim=1))
            metrics.update(logits, known)
            writing.write(batch.index, logs)
            processes.progress()
        every = processes.gather(columns.arrays())
        *rest, all_labels, index, is_finite = (np.concatenate(column) for column in zip(*every, strict=True))
        if not len(index):
            raise DataError("there is no image to evaluate")
        check_complete(index, count)
        order = np.argsort(index)
        if not is_finite.all():
            first = int(index[order[~is_finite[order]][0]])
            who = f"image {first}" if name_of is None else name_of(first)
            bad = int((~is_finite).sum())
            raise NonFiniteError(f"a logit of {who} is NaN or infinite ({bad} of {count} images)")
    if processes.several:
        # Sums of all processes: those rows that one still holds as they are go into its bins first.
        together = StreamingMetrics(classes, device=device)
        together.merge(processes.add(metrics.state()))
        metrics = together
    areas, area = metrics.areas()
    rows = None if file is None else Stored(file, (count, classes))
    predicted, confidence, of_label, before, top, top_probabilities = (column[order] for column in rest)
    return Predictions(
        all_labels[order], predicted, confidence, of_label, before, top, top_probabilities, areas, float(area), rows
    )


class _Columns:
    """What is kept of each image, batch by batch, on the device.

    One tensor for all images from the beginning: small tensors that stay between the large ones of each batch would
    keep those from being freed (2.7 GB instead of 0.7 for 200,000 images of 1,000 classes).
    """

    def __init__(
        self, images: int, classes: int, device: torch.device | str, real: torch.dtype = torch.float32
    ) -> None:
        few, self.classes, self._seen = min(TOP, classes), classes, 0
        shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
            ((), torch.int64),  # predicted
            ((), real),  # confidence
            ((), real),  # of_label
            ((), torch.int64),  # before
            ((few,), torch.int32),  # top
            ((few,), real),  # top_probabilities
            ((), torch.int64),  # labels
            ((), torch.int64),  # index
            ((), torch.bool),  # whether all are finite
        )
        self._kept = [torch.empty((images, *shape), dtype=kind, device=device) for shape, kind in shapes]

    def add(self, probabilities: Tensor, labels: Tensor, index: Tensor, finite: Tensor) -> None:
        """Take in rows [B, K], their labels [B], which images they are, and whether all their logits are finite."""
        of_label = probabilities.gather(1, labels[:, None])
        numbers = torch.arange(self.classes, device=probabilities.device)
        equal = (probabilities == of_label) & (numbers < labels[:, None])
        before = ((probabilities > of_label) | equal).sum(dim=1)
        predicted = probabilities.argmax(dim=1)
        best = probabilities.topk(min(TOP, self.classes), dim=1)
        confidence = probabilities.gather(1, predicted[:, None])[:, 0]
        found = (predicted, confidence, of_label[:, 0], before, best.indices, best.values, labels, index, finite)
        rows = slice(self._seen, self._seen + len(labels))
        while rows.stop > len(self._kept[0]):  # an image came twice: as many more, for the message that names it
            self._kept = [torch.cat([each, torch.empty_like(each)]) for each in self._kept]
        for kept, values in zip(self._kept, found, strict=True):
            kept[rows].copy_(values, non_blocking=True)
        self._seen = rows.stop

    def arrays(self) -> list[Array]:
        """Of the images that were taken in: the columns in the order above."""
        return [each[: self._seen].cpu().numpy() for each in self._kept]


class _Writing:
    """A file of rows that several processes fill; it appears when all are there."""

    def __init__(self, path: Path | None, shape: tuple[int, int], processes: Processes) -> None:
        self.path, self.shape, self.processes = path, shape, processes

    def __enter__(self) -> "_Writing":
        if self.path is None:
            return self
        name = self.processes.share(f".{self.path.name}.{secrets.token_hex(8)}{PART}")
        self.temporary = self.path.with_name(name)
        header = {"descr": "<f2", "fortran_order": False, "shape": self.shape}
        try:
            if self.processes.first:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.temporary.open("wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    file.truncate(file.tell() + 2 * self.shape[0] * self.shape[1])
            self.processes.highest(0)  # it is there
            self.file = self.temporary.open("r+b")
            self.start = os.fstat(self.file.fileno()).st_size - 2 * self.shape[0] * self.shape[1]
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def write(self, index: Tensor, logs: Tensor) -> None:
        """Put rows [B, K] of logarithms in their places."""
        if self.path is None:
            return
        rows = logs.clamp(min=_LOWEST).half().cpu().numpy()
        places = index.cpu().numpy()
        if places.min() < 0 or places.max() >= self.shape[0]:
            return  # which ``check_complete`` reports
        ends = np.flatnonzero(np.diff(places) != 1) + 1  # of runs of images that follow each other
        try:
            for run in np.split(np.arange(len(places)), ends):
                self.file.seek(self.start + 2 * self.shape[1] * int(places[run[0]]))
                self.file.write(rows[run].tobytes())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.path is None:
            return
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if kind is None:
                self.processes.highest(0)  # all have written
                if self.processes.first:
                    move(self.temporary, self.path)
                self.processes.highest(0)  # it can be read
        except OSError as failed:
            raise StorageError(f"cannot write {self.path}: {failed.strerror or failed}") from failed
        finally:
            if kind is not None or self.temporary.exists():
                self.temporary.unlink(missing_ok=True)


def blocks_of(*several: Rows) -> Iterator[tuple[slice, Sequence[Array]]]:
    """The same rows of several networks, block by block."""
    for found in zip(*(each.blocks() for each in several), strict=True):
        yield found[0][0], [block for _, block in found]


def as_rows(probabilities: "Rows | Array") -> Rows:
    """An array as rows; rows as they are."""
    if isinstance(probabilities, np.ndarray):
        return Held(probabilities)
    return probabilities


def _slices(shape: tuple[int, int]) -> Iterator[slice]:
    count, classes = shape
    step = max(1, _BLOCK // max(1, classes))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
