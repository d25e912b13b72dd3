"""Run a network on every image of a split, in memory of O(N) where N x K is large.

Up to ``MAX_VALUES_IN_MEMORY`` numbers all probabilities are held.  Above that, what the metrics need of each image is
computed batch by batch, AUC comes from bins, and the probabilities themselves go, where they are wanted later, into a
file of float16.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import DataError, NonFiniteError, StorageError, UsageError
from potstill.evaluation.classification import Array, exact_auc_per_class
from potstill.evaluation.metrics import StreamingMetrics
from potstill.io import PART, replace_file
from potstill.types import Batch


class EvaluationLoader(Protocol):
    """The part of a ``Loader`` that evaluation needs."""

    @property
    def count(self) -> int:
        """Images in the split."""

    def epoch(self) -> Iterator[Batch]:
        """Batches with ``index``, each image in one of them."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block: eval mode and no gradients; afterwards each submodule has its own mode back.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluation_mode(net):
        ...     net.training, net[0].training
        (False, False)
        >>> net.training, net[0].training, net[1].training
        (True, True, False)
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a module may keep what it computes here (position tables) and train with it later.
        with torch.no_grad():
            yield model
    finally:
        # Through train(), parents first: some networks override it to drop what they cached in eval mode.
        for module, mode in before:
            module.train(mode)


def predict_probabilities(
    model: nn.Module,
    loader: EvaluationLoader,
    *,
    classes: int,
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bf16"] = "float32",
    processes: ProcessGroup = SINGLE_PROCESS,
    names: Sequence[str] | Callable[[int], str] | None = None,
) -> tuple[Array, Array, Array]:
    """Ask ``model`` once for every image that ``loader`` lists, in eval mode and without gradients.

    Args:
        model: images [B, 3, S, S] -> logits [B, classes]; already on ``device``.
        loader: in listed order, without augmentation.
        classes: K.
        device: where the model is.
        precision: "bf16": the network runs under autocast; the softmax is always float32.
        processes: each of them has some of the batches; all get the answers to all.
        names: [N], of the images, for messages; or what gives the name of one.

    Returns:
        probabilities [N, K] float32, labels [N] int64 and index [N] int64 (0, 1, 2, ...); row i is image i.

    Raises:
        NonFiniteError: a logit is NaN or infinite; names the first such image.
        DataError: an image was left out or came twice.
        UsageError: logits of a wrong shape.
    """
    if precision not in ("float32", "bf16"):
        raise UsageError(f"precision must be float32 or bf16 here, got {precision!r}")
    kind = torch.device(device).type
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with evaluation_mode(model):
        for batch in loader.epoch():
            if batch.index is None:
                raise UsageError("to evaluate, the loader must number its images (Batch.index)")
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16"):
                logits = model(batch.images)
            if logits.shape != (len(batch), classes):
                wanted = [len(batch), classes]
                raise UsageError(f"{type(model).__name__} must return logits {wanted}, got {list(logits.shape)}")
            logits = logits.float()
            # Kept on the device: copying each batch would wait for it.
            parts.append((logits.softmax(dim=1), logits.isfinite().all(dim=1), batch.labels, batch.index))
            processes.progress()
    own = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    every = [columns for columns in processes.gather(own) if columns]  # few images: some processes have none
    if not every:
        raise DataError("there is no image to evaluate")
    probabilities, finite, labels, index = (np.concatenate(column) for column in zip(*every, strict=True))
    check_complete(index, loader.count)
    order = np.argsort(index)
    if not finite.all():
        first = int(order[~finite[order]][0])
        count = int((~finite).sum())
        image = int(index[first])
        who = f"image {image}" if names is None else names(image) if callable(names) else names[image]
        raise NonFiniteError(f"a logit of {who} is NaN or infinite ({count} of {len(index)} images)")
    return probabilities[order], labels[order], index[order]


def check_complete(index: np.ndarray[Any, Any], count: int) -> None:
    """Check that each of ``count`` images was evaluated once.

    Raises:
        DataError: an image was left out or came twice.
    """
    seen = np.bincount(index, minlength=count)
    if len(seen) == count and (seen == 1).all():
        return
    left_out, twice = np.flatnonzero(seen[:count] == 0), np.flatnonzero(seen > 1)
    raise DataError(
        f"each of {count} images must be evaluated once: {len(left_out)} left out {left_out[:3].tolist()}, "
        f"{len(twice)} came twice {twice[:3].tolist()}, {max(0, len(seen) - count)} numbered above {count - 1}"
    )


MAX_SORTED_SCORES = 100_000_000  # N * K up to which scores are sorted for AUC; beyond that it comes from bins
MAX_VALUES_IN_MEMORY = 10_000_000  # N * K up to which all probabilities are held and written
TOP_CLASSES = 5  # classes of each image that are kept above that
_BLOCK_VALUES = 4_000_000  # numbers that are in memory at once
_MIN_LOG_PROBABILITY = -60_000.0  # logarithm of a probability, in the range of float16


class Probabilities(Protocol):
    """Probabilities [N, K] that are read in blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Consecutive rows, and which they are; the blocks depend on the shape alone."""


@dataclass(frozen=True)
class ArrayProbabilities:
    """Rows of an array."""

    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.array.shape[0], self.array.shape[1]

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Views of the array."""
        for rows in _row_slices(self.shape):
            yield rows, self.array[rows]


@dataclass(frozen=True)
class FileProbabilities:
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
                for rows in _row_slices(self.shape):
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
        label_probability: [N], probability of the label.
        label_rank: [N] int64, classes that come before the label: 0 where it is the most probable.
        top, top_probabilities: [N, min(K, TOP)], the most probable classes in order, and their probabilities.
        auc_per_class: [K], NaN where it is undefined.
        auc_micro: AUC of all classes pooled.
        probabilities: all of them; None if they were not kept.
    """

    labels: Array
    predicted: Array
    confidence: Array
    label_probability: Array
    label_rank: Array
    top: Array
    top_probabilities: Array
    auc_per_class: Array
    auc_micro: float
    probabilities: Probabilities | None

    @property
    def classes(self) -> int:
        """K."""
        return len(self.auc_per_class)

    @property
    def array(self) -> Array | None:
        """[N, K] probabilities, where they are held."""
        return self.probabilities.array if isinstance(self.probabilities, ArrayProbabilities) else None

    @property
    def correct(self) -> Array:
        """[N] bool."""
        return np.asarray(self.predicted == self.labels)

    def confusion(self) -> tuple[Array, Array, Array]:
        """True class, predicted class and number of images, of each pair of classes that has any; by class."""
        cells, images = np.unique(self.labels * self.classes + self.predicted, return_counts=True)
        return cells // self.classes, cells % self.classes, images

    @classmethod
    def of(cls, rows: "Probabilities | Array", labels: Array) -> "Predictions":
        """From probabilities [N, K] and labels [N] int64 in [0, K).

        Raises:
            UsageError: labels that do not fit.
            NonFiniteError: a probability is NaN or infinite.
        """
        rows = ArrayProbabilities(rows) if isinstance(rows, np.ndarray) else rows
        count, classes = rows.shape
        if labels.shape != (count,) or (count and not 0 <= labels.min() <= labels.max() < classes):
            raise UsageError(f"probabilities [{count}, {classes}] need as many labels from 0 to {classes - 1}")
        real = rows.array.dtype if isinstance(rows, ArrayProbabilities) else np.dtype(np.float64)
        columns = _ColumnBuffer(count, classes, "cpu", torch.float32 if real == np.float32 else torch.float64)
        exact = isinstance(rows, ArrayProbabilities) and count * classes <= MAX_SORTED_SCORES
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
        if isinstance(rows, ArrayProbabilities) and exact:
            auc_per_class, auc_micro = (
                exact_auc_per_class(rows.array, labels) if count else (np.full(classes, np.nan), np.nan)
            )
        else:
            assert metrics is not None
            auc_per_class, auc_micro = metrics.areas()
        predicted, confidence, label_probability, label_rank, top, top_probabilities, *_ = columns.arrays()
        return cls(
            labels,
            predicted,
            confidence,
            label_probability,
            label_rank,
            top,
            top_probabilities,
            auc_per_class,
            float(auc_micro),
            rows,
        )


def predict_split(
    model: nn.Module,
    loader: EvaluationLoader,
    *,
    classes: int,
    device: torch.device | str = "cpu",
    processes: ProcessGroup = SINGLE_PROCESS,
    name_of: Callable[[int], str] | None = None,
    file: Path | None = None,
    labels: Array | None = None,
    most: int = MAX_VALUES_IN_MEMORY,
) -> Predictions:
    """Run ``model`` once on every image that ``loader`` lists, in eval mode, in float32 and without gradients.

    Args:
        model: images [B, 3, S, S] -> logits [B, classes]; already on ``device``.
        loader: in listed order, without augmentation.
        classes: K.
        device: where the model is.
        processes: each of them has some of the batches; all get the same result.
        name_of: of an image, for messages.
        file: where all probabilities go, as ``FileProbabilities`` describes, if there are more than ``most``; None:
            nowhere.
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
        probabilities, own_labels, _ = predict_probabilities(
            model, loader, classes=classes, device=device, processes=processes, names=name_of
        )
        return Predictions.of(probabilities, own_labels if labels is None else labels)
    columns, metrics = _ColumnBuffer(count, classes, device), StreamingMetrics(classes, device=device)
    given = torch.from_numpy(np.zeros(0, np.int64) if labels is None else labels).to(device)
    with evaluation_mode(model), _ProbabilityWriter(file, (count, classes), processes) as writing:
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
    auc_per_class, auc_micro = metrics.areas()
    rows = None if file is None else FileProbabilities(file, (count, classes))
    predicted, confidence, label_probability, label_rank, top, top_probabilities = (column[order] for column in rest)
    return Predictions(
        all_labels[order],
        predicted,
        confidence,
        label_probability,
        label_rank,
        top,
        top_probabilities,
        auc_per_class,
        float(auc_micro),
        rows,
    )


class _ColumnBuffer:
    """What is kept of each image, batch by batch, on the device.

    One tensor for all images from the beginning: small tensors that stay between the large ones of each batch would
    keep those from being freed (2.7 GB instead of 0.7 for 200,000 images of 1,000 classes).
    """

    def __init__(
        self, images: int, classes: int, device: torch.device | str, real: torch.dtype = torch.float32
    ) -> None:
        few, self.classes, self._seen = min(TOP_CLASSES, classes), classes, 0
        shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
            ((), torch.int64),  # predicted
            ((), real),  # confidence
            ((), real),  # label_probability
            ((), torch.int64),  # label_rank
            ((few,), torch.int32),  # top
            ((few,), real),  # top_probabilities
            ((), torch.int64),  # labels
            ((), torch.int64),  # index
            ((), torch.bool),  # whether all are finite
        )
        self._kept = [torch.empty((images, *shape), dtype=kind, device=device) for shape, kind in shapes]

    def add(self, probabilities: Tensor, labels: Tensor, index: Tensor, finite: Tensor) -> None:
        """Take in rows [B, K], their labels [B], which images they are, and whether all their logits are finite."""
        label_probability = probabilities.gather(1, labels[:, None])
        numbers = torch.arange(self.classes, device=probabilities.device)
        equal = (probabilities == label_probability) & (numbers < labels[:, None])
        label_rank = ((probabilities > label_probability) | equal).sum(dim=1)
        predicted = probabilities.argmax(dim=1)
        best = probabilities.topk(min(TOP_CLASSES, self.classes), dim=1)
        confidence = probabilities.gather(1, predicted[:, None])[:, 0]
        found = (
            predicted,
            confidence,
            label_probability[:, 0],
            label_rank,
            best.indices,
            best.values,
            labels,
            index,
            finite,
        )
        rows = slice(self._seen, self._seen + len(labels))
        while rows.stop > len(self._kept[0]):  # an image came twice: as many more, for the message that names it
            self._kept = [torch.cat([each, torch.empty_like(each)]) for each in self._kept]
        for kept, values in zip(self._kept, found, strict=True):
            kept[rows].copy_(values, non_blocking=True)
        self._seen = rows.stop

    def arrays(self) -> list[Array]:
        """Of the images that were taken in: the columns in the order above."""
        return [each[: self._seen].cpu().numpy() for each in self._kept]


class _ProbabilityWriter:
    """A file of rows that several processes fill; it appears when all are there."""

    def __init__(self, path: Path | None, shape: tuple[int, int], processes: ProcessGroup) -> None:
        self.path, self.shape, self.processes = path, shape, processes

    def __enter__(self) -> "_ProbabilityWriter":
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
        rows = logs.clamp(min=_MIN_LOG_PROBABILITY).half().cpu().numpy()
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
                    replace_file(self.temporary, self.path)
                self.processes.highest(0)  # it can be read
        except OSError as failed:
            raise StorageError(f"cannot write {self.path}: {failed.strerror or failed}") from failed
        finally:
            if kind is not None or self.temporary.exists():
                self.temporary.unlink(missing_ok=True)


def iterate_blocks(*several: Probabilities) -> Iterator[tuple[slice, Sequence[Array]]]:
    """The same rows of several networks, block by block."""
    for found in zip(*(each.blocks() for each in several), strict=True):
        yield found[0][0], [block for _, block in found]


def as_probabilities(probabilities: "Probabilities | Array") -> Probabilities:
    """An array as rows; rows as they are."""
    if isinstance(probabilities, np.ndarray):
        return ArrayProbabilities(probabilities)
    return probabilities


def _row_slices(shape: tuple[int, int]) -> Iterator[slice]:
    count, classes = shape
    step = max(1, _BLOCK_VALUES // max(1, classes))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
