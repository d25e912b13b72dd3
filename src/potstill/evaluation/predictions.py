"""Predictions of a network for every image of a split, in O(N) memory if N x K is large.

Up to ``MAX_VALUES_IN_MEMORY`` values all probabilities are kept.  Above that, the metrics' inputs are computed batch by
batch, AUC comes from bins, and the probabilities can be written to a float16 file.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import DataError, NonFiniteError, StorageError, UsageError, storing
from potstill.evaluation import Array, exact_auc_per_class
from potstill.evaluation.metrics import StreamingMetrics, label_rank
from potstill.io import PART, replace_file
from potstill.types import Batch

if TYPE_CHECKING:
    from potstill.data.loader import Loader


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, eval mode and no gradients; afterwards each submodule's mode is restored.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluation_mode(net):
        ...     net.training, net[0].training
        (False, False)
        >>> net.training, net[0].training, net[1].training
        (True, True, False)
    """
    before = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in before):
        model.eval()
    try:
        # Not inference_mode: a module may cache tensors here (position tables) and use them in training.
        with torch.no_grad():
            yield model
    finally:
        # Through train(), parents first: some networks override it to drop tensors cached in eval mode.
        for module, mode in before:
            if module.training != mode:  # not of those whose parents have set it
                module.train(mode)


def predict_probabilities(
    model: nn.Module,
    loader: "Loader",
    *,
    classes: int,
    processes: ProcessGroup = SINGLE_PROCESS,
    what: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, Array, Array] | None:
    """Run ``model`` once on every image of ``loader``, in eval mode, in float32 and without gradients.

    Return probabilities [N, K] float32, labels and index (0, 1, ...) [N] int64, in the first process only.
    NonFiniteError names ``what`` and the first image with a logit that is NaN or infinite; DataError: an image was left
    out or came twice.  ``progress`` receives how many images of how many are done.
    """
    parts: list[tuple[Tensor, ...]] = []
    with evaluation_mode(model):
        for batch, index, logits in _iterate_logits(model, loader, classes, processes, progress):
            # Kept on the device: copying each batch would wait for it.
            parts.append((logits.softmax(dim=1), batch.labels, index, logits.isfinite().all(dim=1)))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    gathered = _gather_columns(columns, loader, processes, what)
    return None if gathered is None else (gathered[0], gathered[1], gathered[2])


def _iterate_logits(
    model: nn.Module,
    loader: "Loader",
    classes: int,
    processes: ProcessGroup,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Yield each batch, its image indices [B] and float32 logits [B, K]."""
    done = 0
    for batch in loader.epoch():
        if batch.index is None:
            raise UsageError("to evaluate, the loader must number its images (Batch.index)")
        logits = model(batch.images)
        if logits.shape != (len(batch), classes):
            expected = [len(batch), classes]
            raise UsageError(f"{type(model).__name__} must return logits {expected}, got {list(logits.shape)}")
        yield batch, batch.index, logits.float()
        done += len(batch) * processes.count
        processes.progress()
        if progress is not None:
            progress(min(done, loader.count), loader.count)


def _gather_columns(columns: list[Array], loader: "Loader", processes: ProcessGroup, what: str) -> list[Array] | None:
    """Concatenate the columns of all processes in order of the images, and check that all is there and finite.

    The last two columns are index [n] and whether all logits are finite [n], which is not returned.  Only the first
    process gets them; what it finds wrong is raised in all.
    """
    gathered = processes.collect(columns) or []
    return processes.run_on_first(lambda: _in_order([each for each in gathered if each], loader, what))


def _in_order(gathered: list[list[Array]], loader: "Loader", what: str) -> list[Array]:
    """Do as ``_gather_columns``, from the columns of each process."""
    if not any(len(each[0]) for each in gathered):
        raise DataError("there is no image to evaluate")
    *values, finite = (np.concatenate(column) for column in zip(*gathered, strict=True))
    index, count = values[-1], loader.count
    check_complete(index, count)
    if not finite.all():
        image = int(index[~finite].min())
        name = f"{what}, {loader.images.names[image]}," if what else f"image {image}"
        raise NonFiniteError(f"a logit of {name} is NaN or infinite ({int((~finite).sum())} of {count} images)")
    order = np.argsort(index)
    return [column[order] for column in values]


def check_complete(index: np.ndarray[Any, Any], count: int) -> None:
    """Check that each of ``count`` images was evaluated once."""
    seen = np.bincount(index, minlength=count)
    if len(seen) == count and (seen == 1).all():
        return
    left_out, twice = np.flatnonzero(seen[:count] == 0), np.flatnonzero(seen > 1)
    raise DataError(
        f"each of {count} images must be evaluated once: {len(left_out)} left out {left_out[:3].tolist()}, "
        f"{len(twice)} came twice {twice[:3].tolist()}, {max(0, len(seen) - count)} numbered above {count - 1}"
    )


MAX_SORTED_SCORES = 100_000_000  # N * K up to which AUC is exact; beyond that it comes from bins
MAX_VALUES_IN_MEMORY = 10_000_000  # N * K up to which all probabilities are kept in memory
TOP_CLASSES = 5  # classes of each image that are kept above that
_BLOCK_VALUES = 4_000_000  # values in a block
_MIN_LOG_PROBABILITY = -60_000.0  # in the range of float16


class Probabilities(Protocol):
    """Probabilities [N, K] that are read in blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield consecutive rows with their slice; the blocks depend on the shape only."""


@dataclass(frozen=True)
class ArrayProbabilities:
    """Probabilities in memory."""

    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.array.shape[0], self.array.shape[1]

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield views of the array."""
        for rows in _row_slices(self.shape):
            yield rows, self.array[rows]


@dataclass(frozen=True)
class FileProbabilities:
    """Probabilities in a NumPy file of float16 logarithms, which have three digits however small they are."""

    path: Path
    shape: tuple[int, int]

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield rows read from the file; a memory map would count as memory of this process."""
        count, classes = self.shape
        try:
            with self.path.open("rb") as file:
                file.seek(-2 * count * classes, os.SEEK_END)  # after the NumPy header
                for rows in _row_slices(self.shape):
                    logs = np.fromfile(file, np.float16, (rows.stop - rows.start) * classes)
                    yield rows, np.exp(logs.reshape(-1, classes).astype(np.float32))
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self.path}: {error}") from error


@dataclass(frozen=True)
class Predictions:
    """Predictions for a split; row i is image i."""

    labels: Array  # [N] int64
    predicted: Array  # [N] int64, the most probable class; ties go to the lower index
    confidence: Array  # [N], its probability
    label_probability: Array  # [N], probability of the label
    label_rank: Array  # [N] int64, number of classes before the label
    top: Array  # [N, min(K, 5)], the most probable classes in order
    top_probabilities: Array  # [N, min(K, 5)]
    auc_per_class: Array  # [K], NaN if undefined
    auc_micro: float  # of all classes pooled
    probabilities: Probabilities | None  # [N, K]; None if they were not kept

    @property
    def classes(self) -> int:
        """K."""
        return len(self.auc_per_class)

    @property
    def array(self) -> Array | None:
        """Probabilities [N, K] if they are in memory."""
        return self.probabilities.array if isinstance(self.probabilities, ArrayProbabilities) else None

    @property
    def correct(self) -> Array:
        """Whether each prediction is correct, [N] bool."""
        return np.asarray(self.predicted == self.labels)

    def confusion(self) -> tuple[Array, Array, Array]:
        """Return true class, predicted class and number of images of each non-empty cell of the confusion matrix."""
        cells, images = np.unique(self.labels * self.classes + self.predicted, return_counts=True)
        return cells // self.classes, cells % self.classes, images

    @staticmethod
    def of(rows: "Probabilities | Array", labels: Array) -> "Predictions":
        """Return the predictions of probabilities [N, K] for labels [N] int64 in [0, K)."""
        rows = as_probabilities(rows)
        count, classes = rows.shape
        if labels.shape != (count,):
            raise UsageError(f"probabilities [{count}, {classes}] need labels [{count}], got {list(labels.shape)}")
        if count and not 0 <= labels.min() <= labels.max() < classes:
            raise UsageError(f"labels must be 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
        array = rows.array if isinstance(rows, ArrayProbabilities) else None
        real = torch.float32 if array is not None and array.dtype == np.float32 else torch.float64
        columns = _ColumnBuffer(count, classes, "cpu", real)
        exact = array is not None and count * classes <= MAX_SORTED_SCORES
        metrics = None if exact else StreamingMetrics(classes)
        tiny = float(np.finfo(np.float32).tiny)  # so that the logarithm of a probability rounded to 0 stays finite
        for which, block in rows.blocks():
            probabilities, block_labels = torch.from_numpy(np.ascontiguousarray(block)), torch.from_numpy(labels[which])
            finite = probabilities.isfinite().all(dim=1)
            if not bool(finite.all()):
                image = which.start + int((~finite).nonzero()[0, 0])
                raise NonFiniteError(f"a probability of image {image} is NaN or infinite")
            columns.add(probabilities, block_labels, torch.arange(which.start, which.stop), finite)
            if metrics is not None:
                metrics.update(probabilities.clamp(min=tiny).log(), block_labels)
        if metrics is not None:
            auc_per_class, auc_micro = metrics.auc_per_class()
        elif array is not None and count:
            auc_per_class, auc_micro = exact_auc_per_class(array, labels)
        else:
            auc_per_class, auc_micro = np.full(classes, np.nan), np.nan
        return _from_columns(labels, columns.arrays()[:6], auc_per_class, auc_micro, rows)


def predict_split(
    model: nn.Module,
    loader: "Loader",
    *,
    classes: int,
    device: torch.device | str = "cpu",
    processes: ProcessGroup = SINGLE_PROCESS,
    what: str = "",
    file: Path | None = None,
    labels: Array | None = None,
    max_values: int = MAX_VALUES_IN_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions | None:
    """Run ``model`` once on every image of ``loader``, in eval mode, in float32 and without gradients.

    More than ``max_values`` probabilities N * K are not kept in memory; ``file`` receives them, see
    ``FileProbabilities``. ``labels`` override those of the loader.  Only the first process gets the result.  Errors and
    ``progress`` as of ``predict_probabilities``.
    """
    count = loader.count
    if count * classes <= max_values:
        found = predict_probabilities(model, loader, classes=classes, processes=processes, what=what, progress=progress)
        if found is None:
            return None
        probabilities, loader_labels, _ = found
        return Predictions.of(probabilities, loader_labels if labels is None else labels)
    columns, metrics = _ColumnBuffer(count, classes, device), StreamingMetrics(classes, device=device)
    given = torch.from_numpy(np.zeros(0, np.int64) if labels is None else labels).to(device)
    with evaluation_mode(model), _ProbabilityWriter(file, (count, classes), processes) as writer:
        for batch, index, logits in _iterate_logits(model, loader, classes, processes, progress):
            logs = logits.log_softmax(dim=1)
            batch_labels = batch.labels if labels is None else given[index]
            columns.add(logs.exp(), batch_labels, index, logits.isfinite().all(dim=1))
            metrics.update(logits, batch_labels)
            writer.write(index, logs)
        gathered = _gather_columns(columns.arrays(), loader, processes, what)
    if processes.several:
        sums = processes.add_on_first(metrics.state())
        metrics = StreamingMetrics(classes, device=device)
        metrics.merge(sums)
    if gathered is None:
        return None
    *values, all_labels, _ = gathered
    auc_per_class, auc_micro = metrics.auc_per_class()
    rows = None if file is None else FileProbabilities(file, (count, classes))
    return _from_columns(all_labels, values, auc_per_class, auc_micro, rows)


def _from_columns(
    labels: Array, columns: list[Array], auc_per_class: Array, auc_micro: float, rows: Probabilities | None
) -> Predictions:
    predicted, confidence, label_probability, rank, top, top_probabilities = columns
    return Predictions(
        labels,
        predicted,
        confidence,
        label_probability,
        rank,
        top,
        top_probabilities,
        auc_per_class,
        float(auc_micro),
        rows,
    )


class _ColumnBuffer:
    """The columns of ``Predictions`` on the device, allocated at the start: small tensors between the large ones of
    each batch would fragment memory (2.7 GB instead of 0.7 for 200,000 images of 1,000 classes).
    """

    def __init__(
        self, images: int, classes: int, device: torch.device | str, real: torch.dtype = torch.float32
    ) -> None:
        top, self._rows = min(TOP_CLASSES, classes), 0
        shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
            ((), torch.int64),  # predicted
            ((), real),  # confidence
            ((), real),  # label_probability
            ((), torch.int64),  # label_rank
            ((top,), torch.int32),  # top
            ((top,), real),  # top_probabilities
            ((), torch.int64),  # labels
            ((), torch.int64),  # index
            ((), torch.bool),  # whether all logits are finite
        )
        self._columns = [torch.empty((images, *shape), dtype=kind, device=device) for shape, kind in shapes]

    def add(self, probabilities: Tensor, labels: Tensor, index: Tensor, finite: Tensor) -> None:
        """Add probabilities [B, K], labels [B], image indices [B], and whether all logits are finite [B]."""
        predicted = probabilities.argmax(dim=1)
        top = probabilities.topk(min(TOP_CLASSES, probabilities.shape[1]), dim=1)
        values = (
            predicted,
            probabilities.gather(1, predicted[:, None])[:, 0],
            probabilities.gather(1, labels[:, None])[:, 0],
            label_rank(probabilities, labels),
            top.indices,
            top.values,
            labels,
            index,
            finite,
        )
        rows = slice(self._rows, self._rows + len(labels))
        while rows.stop > len(self._columns[0]):  # images came twice: make room, for the message that names them
            self._columns = [torch.cat([each, torch.empty_like(each)]) for each in self._columns]
        for column, batch_values in zip(self._columns, values, strict=True):
            column[rows].copy_(batch_values, non_blocking=True)
        self._rows = rows.stop

    def arrays(self) -> list[Array]:
        """Return the columns, in the order above, as arrays."""
        return [each[: self._rows].cpu().numpy() for each in self._columns]


class _ProbabilityWriter:
    """A file of ``FileProbabilities`` that several processes write; it appears once it is complete."""

    def __init__(self, path: Path | None, shape: tuple[int, int], processes: ProcessGroup) -> None:
        self.path, self.shape, self.processes = path, shape, processes

    def __enter__(self) -> "_ProbabilityWriter":
        if self.path is None:
            return self
        name = self.processes.share(f".{self.path.name}.{secrets.token_hex(8)}{PART}")
        self.temporary = self.path.with_name(name)
        header = {"descr": "<f2", "fortran_order": False, "shape": self.shape}
        with storing(f"write {self.path}"):
            if self.processes.first:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.temporary.open("wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    file.truncate(file.tell() + 2 * self.shape[0] * self.shape[1])
            self.processes.highest(0)  # wait until the file exists
            self.file = self.temporary.open("r+b")
            self.start = os.fstat(self.file.fileno()).st_size - 2 * self.shape[0] * self.shape[1]
        return self

    def write(self, index: Tensor, logs: Tensor) -> None:
        """Write rows [B, K] of logarithms for the images ``index`` [B]."""
        if self.path is None:
            return
        rows = logs.clamp(min=_MIN_LOG_PROBABILITY).half().cpu().numpy()
        images = index.cpu().numpy()
        if images.min() < 0 or images.max() >= self.shape[0]:
            return  # which ``check_complete`` reports
        ends = np.flatnonzero(np.diff(images) != 1) + 1  # of runs of consecutive images
        with storing(f"write {self.path}"):
            for run in np.split(np.arange(len(images)), ends):
                self.file.seek(self.start + 2 * self.shape[1] * int(images[run[0]]))
                self.file.write(rows[run].tobytes())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.path is None:
            return
        try:
            with storing(f"write {self.path}"):
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                if kind is None:
                    self.processes.highest(0)  # wait until all have written
                    if self.processes.first:
                        replace_file(self.temporary, self.path)
                    self.processes.highest(0)  # wait until it is in place
        finally:
            if kind is not None or self.temporary.exists():
                self.temporary.unlink(missing_ok=True)


def iterate_blocks(*several: Probabilities) -> Iterator[tuple[slice, Sequence[Array]]]:
    """Yield the same rows of several networks, block by block."""
    for blocks in zip(*(each.blocks() for each in several), strict=True):
        yield blocks[0][0], [block for _, block in blocks]


def as_probabilities(probabilities: "Probabilities | Array") -> Probabilities:
    """Wrap an array; return anything else unchanged."""
    if isinstance(probabilities, np.ndarray):
        return ArrayProbabilities(probabilities)
    return probabilities


def _row_slices(shape: tuple[int, int]) -> Iterator[slice]:
    count, classes = shape
    step = max(1, _BLOCK_VALUES // max(1, classes))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
