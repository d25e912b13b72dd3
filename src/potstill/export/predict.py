"""Predictions for unlabeled images and videos, by one model or by a cascade of student and teacher; and their table.

Videos and cameras are read by PyAV, which is imported on first use.
"""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.data.concurrency import threaded_map
from potstill.data.entries import LINK_TO_FOLDER
from potstill.data.image_io import Pixels, decode
from potstill.data.image_structure import IMAGE_HEAD, begins_as_image, has_image_suffix
from potstill.data.preprocessing import decoded_side
from potstill.data.sources import walk_images
from potstill.errors import ArtifactError, DataError, StorageError, UsageError, check_argument
from potstill.evaluation.cascade import CONFIDENCE, Cascade
from potstill.export.onnx import ONNX_SUFFIX, load_onnx
from potstill.formatting import format_names
from potstill.input_spec import InputSpec
from potstill.io import PART, csv_texts, encode_text, nearest_name, replace_file, write_chunks

if TYPE_CHECKING:
    from potstill.models.model_file import Classifier


UNKNOWN = "unknown"  # in place of a class below the threshold
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_VIDEO_FORMATS = "mov,mp4,matroska,webm,avi"  # as FFmpeg names them: no playlists, which lead to other files


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why the image could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...]  # (class name, probability in [0, 1]), the most probable first
    error: str | None = None
    answered_by: str | None = None  # of a cascade: "student" or "teacher"
    unknown: bool = False  # whether the largest probability is below the threshold
    frame: int | None = None  # of a video, from 0
    seconds: float | None = None  # from the beginning of the video

    @property
    def label(self) -> str | None:
        """The most probable class; ``UNKNOWN`` below the threshold; None if the image could not be read."""
        return None if not self.classes else UNKNOWN if self.unknown else self.classes[0][0]

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        classes = [{"class": name, "probability": probability} for name, probability in self.classes]
        facts = {"frame": self.frame, "seconds": self.seconds, "answered_by": self.answered_by}
        facts = {key: value for key, value in facts.items() if value is not None}
        return {"path": str(self.path), **facts, **({"unknown": True} if self.unknown else {}), "predictions": classes}


def predict(
    model: "Path | str | Classifier",
    inputs: Sequence[Path | str],
    *,
    top: int = 3,
    batch_size: int = 32,
    device: str = "auto",
    classes: str | None = None,
    risk: float | None = None,
    threshold: float | None = None,
    every: int = 1,
    note: Callable[[str], None] = lambda line: None,
) -> list[Prediction]:
    """Return the most probable classes of each image, preprocessed as for evaluation.

    Args:
        model: a run folder (distilled student, else baseline, else teacher), a model folder or file, a loaded
            Classifier, bare weights (see ``load_classifier``), or an exported ``.onnx`` file (torch is not imported
            then).
        inputs: images, videos, and folders, whose images are found recursively and sorted; see ``find_images``.
        top: largest number of classes for each image.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        classes: class names of bare weights: a file or the name of a list.
        risk: of a run folder: the student answers only where it is confident, and the teacher everywhere else, with
            this promised risk, in (0, 1); see ``potstill.evaluation.cascade``.  None: the student answers alone.
        threshold: images whose largest probability is below it are ``unknown``; None: none are.
        every: of videos, every n-th frame, from the first on.
        note: is called with a line on each thing that was assumed of bare weights.

    Returns:
        One Prediction for each image or frame, in order; an image that cannot be decoded has ``error`` set and no
        classes.  A UserWarning names other files in the folders.

    Raises:
        UsageError: a path that does not exist, a risk that cannot be promised, or a video without PyAV.
        DataError: there is no image.
        ArtifactError: there is no model, or it is damaged.
    """
    found = find_images(inputs)
    if found.left_out:
        some = "; ".join(f"{path}: {reason}" for path, reason in found.left_out[:3])
        warnings.warn(f"{len(found.left_out)} files are left out, such as {some}", stacklevel=2)
    predictor = create_predictor(model, device=device, classes=classes, risk=risk, note=note)
    items = read_items(found.images, every)
    return list(predictor.predict(items, top=top, batch_size=batch_size, threshold=threshold))


@dataclass(frozen=True)
class Item:
    """An image to predict: a file, or a frame of a video, or of neither the error."""

    path: Path
    pixels: Pixels | None = None
    frame: int | None = None
    seconds: float | None = None
    error: str | None = None

    def decode(self, spec: InputSpec) -> Pixels:
        """Return its pixels, of a file as they are decoded for ``spec``."""
        if self.error is not None:
            raise DataError(self.error)
        return decode(self.path, spec.range, decoded_side(spec)) if self.pixels is None else self.pixels


def is_video(path: Path) -> bool:
    """Return whether a path is a video by its name, or a camera."""
    return path.suffix.lower() in VIDEO_SUFFIXES or path.is_char_device()


def read_items(paths: Iterable[Path], every: int = 1) -> Iterator[Item]:
    """Yield each image, and of videos and cameras every n-th frame, from the first on."""
    for path in paths:
        if is_video(path):
            yield from _read_frames(path, every)
        else:
            yield Item(path)


def _read_frames(path: Path, every: int) -> Iterator[Item]:
    try:
        import av
    except ImportError as error:
        raise UsageError(f'{path}: videos and cameras need PyAV\nInstall: pip install "potstill[video]"') from error
    camera = path.is_char_device()
    options = {"protocol_whitelist": "file"} | ({} if camera else {"format_whitelist": _VIDEO_FORMATS})
    number = -1
    try:
        with av.open(str(path.absolute()), format="v4l2" if camera else None, options=options) as container:
            if not container.streams.video:
                yield Item(path, error=f"{path}: no video in it")
                return
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number % every == 0:
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    seconds = None if frame.time is None else round(frame.time, 6)
                    yield Item(path, np.ascontiguousarray(upright), number, seconds)
    except (av.FFmpegError, ValueError) as error:  # ValueError: a pixel format that it does not convert
        reason = getattr(error, "strerror", None) or str(error)
        where = "" if number < 0 else f" after frame {number}"
        yield Item(path, error=f"{path}: cannot be read as a video{where}: {reason}")
        return
    if number < 0:
        yield Item(path, error=f"{path}: no frame in it")


@dataclass(frozen=True)
class Network:
    """A torch or ONNX model."""

    preprocess: Callable[[Pixels], Any]  # right after decoding, so that large photographs do not fill the memory
    probabilities: Callable[[list[Any]], list[list[float]]]  # outputs of ``preprocess`` -> [B, K]
    names: Sequence[str]
    input: InputSpec  # its range and size are those that images are decoded for

    def read(self, item: Item) -> tuple[Item, Any]:
        """Return the item with its preprocessed image, or with the error of one that cannot be decoded."""
        try:
            return item, self.preprocess(item.decode(self.input))
        except DataError as error:
            return item, error


@dataclass(frozen=True)
class Predictor:
    """A network, or a cascade of a student and its teachers."""

    network: Network  # the only one, or the student
    teachers: tuple[Network, ...] = ()  # answer where the student is not above ``threshold``
    combine: Callable[[list[list[list[float]]]], list[list[float]]] = lambda rows: rows[0]
    threshold: float = 0.0  # of the student's largest probability

    def predict(
        self, items: Iterable[Item], *, top: int = 3, batch_size: int = 32, threshold: float | None = None
    ) -> Iterator[Prediction]:
        """Yield the prediction of each item, in order; images are decoded in threads, a few batches ahead."""
        read = threaded_map(self.network.read, items)
        while batch := list(itertools.islice(read, batch_size)):
            good = [at for at, (_, image) in enumerate(batch) if not isinstance(image, DataError)]
            rows = (
                dict(zip(good, self.network.probabilities([batch[at][1] for at in good]), strict=True)) if good else {}
            )
            deferred = [at for at in good if self.teachers and not max(rows[at]) > self.threshold]
            rows |= self._ask_teachers({at: batch[at][0] for at in deferred})
            for at, (item, image) in enumerate(batch):
                if at not in rows:
                    yield Prediction(item.path, (), str(image), frame=item.frame, seconds=item.seconds)
                    continue
                who = None if not self.teachers else "teacher" if at in deferred else "student"
                unknown = threshold is not None and max(rows[at]) < threshold
                classes = _top_classes(rows[at], self.network.names, top)
                yield Prediction(item.path, classes, None, who, unknown, item.frame, item.seconds)

    def _ask_teachers(self, items: Mapping[int, Item]) -> dict[int, list[float]]:
        """Return the teachers' probabilities [K] of each image."""
        if not items:
            return {}
        each = []
        for teacher in self.teachers:
            images = [image for _, image in threaded_map(teacher.read, items.values())]
            if errors := [image for image in images if isinstance(image, DataError)]:
                raise errors[0]  # it was read a moment before
            each.append(teacher.probabilities(images))
        return dict(zip(items, self.combine(each), strict=True))


def create_predictor(
    model: "Path | str | Classifier",
    *,
    device: str = "auto",
    classes: str | None = None,
    risk: float | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Predictor:
    """Load a model, or the student and the teachers of a cascade; arguments and errors as of ``predict``."""
    given = isinstance(model, (str, os.PathLike))
    exported = given and Path(str(model)).suffix.lower() == ONNX_SUFFIX
    if risk is None:
        return Predictor(
            _open_onnx(Path(str(model)), device) if exported else _open_torch(model, device, classes, note)
        )
    if exported or not given:
        raise UsageError("a cascade needs the run folder, which has the student, its teacher and their calibration")
    from potstill.export.loading import find_model_folder

    folder = find_model_folder(str(model))
    if folder is None or classes is not None:
        raise UsageError(f"a cascade needs a run folder, and {model} is bare weights")
    cascade = Cascade.read(folder)
    threshold = cascade.calibration.threshold(risk)
    note(
        f"cascade: {cascade.student} answers where its confidence is above {threshold:.4g}, else "
        f"{format_names(cascade.teachers)}. Promised with {CONFIDENCE:.0%} confidence: of images like those of val, at "
        f"most {100 * risk:g} % get a wrong answer although the teacher's would be right"
    )

    from potstill.experiment.ensembles import cascade_average

    average = cascade_average(cascade)
    student = _open_torch(folder, device, None, note)
    teachers = tuple(_open_torch(folder.parent / name, device, None, note) for name in cascade.teachers)
    for name, teacher in zip(cascade.teachers, teachers, strict=True):
        if tuple(teacher.names) != tuple(student.names):
            raise ArtifactError(f"{folder.parent / name} has other classes than {folder}")

    def combine(each: list[list[list[float]]]) -> list[list[float]]:
        rows: list[list[float]] = average([np.asarray(rows) for rows in each]).tolist()
        return rows

    return Predictor(student, teachers, combine, threshold)


def _open_onnx(path: Path, device: str) -> Network:
    if device not in ("auto", "cpu"):
        raise UsageError(f"an ONNX model runs on the CPU here, got device={device!r}")
    model = load_onnx(path)
    return Network(
        model.prepare,
        lambda images: model.probabilities(images).tolist(),
        model.metadata.class_names,
        model.metadata.input,
    )


def _open_torch(
    model: "Path | str | Classifier", device: str, classes: str | None, note: Callable[[str], None]
) -> Network:
    from potstill.export.loading import find_model_folder, load_classifier

    if isinstance(model, (str, os.PathLike)):
        find_model_folder(model)  # torch, which takes seconds, is not needed to find a mistake in a path

    import torch

    from potstill.data.transforms import preprocess
    from potstill.models.model_file import Classifier
    from potstill.training.devices import create_compute
    from potstill.training.settings import TrainingSettings

    classifier = (
        load_classifier(model, classes=classes, note=note)[0] if isinstance(model, (str, os.PathLike)) else model
    )
    check_argument("model", classifier, (Classifier,), "a run folder, a model or an exported file")
    classifier.module.to(create_compute(TrainingSettings(device=device)).device)

    def probabilities(images: list[Any]) -> list[list[float]]:
        rows: list[list[float]] = classifier.predict(torch.stack(images)).tolist()
        return rows

    spec = classifier.input
    return Network(lambda pixels: preprocess(pixels, spec), probabilities, classifier.class_names, spec)


@dataclass(frozen=True)
class FoundImages:
    """The images to predict, and what was left out."""

    images: list[Path]
    left_out: list[tuple[str, str]]  # path and reason of every other file
    passed_over: Counter[str]  # system files and hidden files


TABLE_SUFFIXES = (".csv", ".parquet")
_ROWS = 4096  # that a table keeps in memory


def check_table(path: Path) -> None:
    """Check that a table of predictions can be written."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise UsageError(f"predictions are written to a file {' or '.join(TABLE_SUFFIXES)}, got {path}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f'{path}: Parquet files need pyarrow\nInstall: pip install "potstill[datasets]"'
            ) from error


def write_table(path: Path, predictions: Iterable[Prediction], top: int, *, cascade: bool, video: bool) -> None:
    """Write predictions as they come to a CSV or Parquet file, which appears when it is complete.

    Columns: ``path``; with videos ``frame`` and ``seconds``; ``prediction`` (a class or "unknown"), ``class_1``,
    ``p_1`` to ``class_K``, ``p_K`` (``top`` of them); with a cascade ``answered_by``; ``error``.
    """
    ranks = range(1, top + 1)
    columns: dict[str, type] = {
        "path": str,
        **({"frame": int, "seconds": float} if video else {}),
        "prediction": str,
        **{key: kind for rank in ranks for key, kind in ((f"class_{rank}", str), (f"p_{rank}", float))},
        **({"answered_by": str} if cascade else {}),
        "error": str,
    }

    def row(each: Prediction) -> tuple[Any, ...]:
        padded = [*each.classes[:top], *[(None, None)] * (top - len(each.classes))]
        flat = [value for pair in padded for value in pair]
        frames = (each.frame, each.seconds) if video else ()
        return (str(each.path), *frames, each.label, *flat, *((each.answered_by,) if cascade else ()), each.error)

    rows = map(row, predictions)
    if path.suffix.lower() == ".csv":
        texts = (["" if cell is None else _short(cell) for cell in each] for each in rows)
        write_chunks(path, map(encode_text, csv_texts(tuple(columns), texts)))
    else:
        _write_parquet(path, columns, rows)


def _short(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) else cell


def _storable(cell: Any) -> Any:
    return encode_text(cell) if isinstance(cell, str) else cell


def _write_parquet(path: Path, columns: Mapping[str, type], rows: Iterator[Sequence[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    temporary = path.with_name(f".{path.name}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema) as writer:
            while part := list(itertools.islice(rows, _ROWS)):
                columns_of_part = zip(zip(*part, strict=True), schema, strict=True)
                arrays = [pa.array(map(_storable, column), field.type) for column, field in columns_of_part]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        replace_file(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def find_images(inputs: Sequence[Path | str], *, follow_links: bool = False) -> FoundImages:
    """Return the given files, and all files in folders that are images by name or signature, but not videos."""
    listed = [inputs] if isinstance(inputs, str | Path) else inputs
    check_argument("inputs", listed, (Iterable,), "paths of images and folders")
    given = []
    for each in listed:
        check_argument("each of inputs", each, (str, Path), "a path")
        given.append(Path(each).expanduser())
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        near = nearest_name(Path(missing[0])) if len(missing) == 1 else ""
        raise UsageError(f"no such image or folder: {format_names(missing, 3)}{near}")
    found = FoundImages([], [], Counter())
    for path in given:
        if path.is_dir():
            _add_folder(found, path, follow_links=follow_links)
        else:
            found.images.append(path)
    if not found.images:
        others = "".join(f"\n  {path}: {reason}" for path, reason in found.left_out[:3])
        raise DataError(f"no images in {', '.join(map(str, given))}{others}")
    return found


def _add_folder(found: FoundImages, folder: Path, *, follow_links: bool) -> None:
    listing = walk_images(folder, follow_links=follow_links)
    found.passed_over.update(listing.passed_over)
    for entry in listing.entries:
        path = folder / entry.name
        if has_image_suffix(entry.name) or _has_image_signature(path):
            found.images.append(path)
        else:
            video = "a video: give it by its own name to read its frames"
            reason = video if path.suffix.lower() in VIDEO_SUFFIXES else "no image, by its name and its content"
            found.left_out.append((str(path), reason))
    for each in listing.findings:
        if each.kind not in ("name", "empty-class"):
            more = "; --follow-links reads it" if each.kind == "link-out" or each.reason == LINK_TO_FOLDER else ""
            found.left_out.append((str(folder / each.path), each.reason + more))


def _has_image_signature(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(IMAGE_HEAD)
    except OSError:
        return False
    return begins_as_image(head)


def _top_classes(row: Sequence[float], names: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    # Stable: ties go to the lower class index.
    ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
    return tuple(ranked[:top])
