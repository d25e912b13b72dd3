"""Predictions for unlabeled images, by one model or by a cascade of student and teacher."""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.data.concurrency import threaded_map
from potstill.data.entries import LINK_TO_FOLDER, has_image_suffix
from potstill.data.image_io import Pixels, decode
from potstill.data.preprocessing import decoded_side
from potstill.data.sources import walk_images
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.evaluation.cascade import CONFIDENCE, Cascade
from potstill.export.onnx import ONNX_SUFFIX, load_onnx
from potstill.formatting import format_names
from potstill.input_spec import InputSpec

if TYPE_CHECKING:
    from potstill.models.model_file import Classifier


_HEAD_BYTES = 16  # enough for the signature of an image without a known suffix
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why the image could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...]  # (class name, probability in [0, 1]), the most probable first
    error: str | None = None
    answered_by: str | None = None  # of a cascade: "student" or "teacher"

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        classes = [{"class": name, "probability": probability} for name, probability in self.classes]
        who = {} if self.answered_by is None else {"answered_by": self.answered_by}
        return {"path": str(self.path), **who, "predictions": classes}


def predict(
    model: "Path | str | Classifier",
    inputs: Sequence[Path | str],
    *,
    top: int = 3,
    batch_size: int = 32,
    device: str = "auto",
    classes: str | None = None,
    risk: float | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[Prediction]:
    """Return the most probable classes of each image, preprocessed as for evaluation.

    Args:
        model: a run folder (distilled student, else baseline, else teacher), a model folder or file, a loaded
            Classifier, bare weights (see ``load_classifier``), or an exported ``.onnx`` file (torch is not imported
            then).
        inputs: images, and folders, whose images are found recursively and sorted; see ``find_images``.
        top: largest number of classes for each image.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        classes: class names of bare weights: a file or the name of a list.
        risk: of a run folder: the student answers only where it is confident, and the teacher everywhere else, with
            this promised risk, in (0, 1); see ``potstill.evaluation.cascade``.  None: the student answers alone.
        note: is called with a line on each thing that was assumed of bare weights.

    Returns:
        One Prediction for each image, in order; an image that cannot be decoded has ``error`` set and no classes.
        A UserWarning names other files in the folders.

    Raises:
        UsageError: a path that does not exist, or a risk that cannot be promised.
        DataError: there is no image.
        ArtifactError: there is no model, or it is damaged.
    """
    found = find_images(inputs)
    if found.left_out:
        some = "; ".join(f"{path}: {reason}" for path, reason in found.left_out[:3])
        warnings.warn(f"{len(found.left_out)} files are left out, such as {some}", stacklevel=2)
    predictor = create_predictor(model, device=device, classes=classes, risk=risk, note=note)
    return list(predictor.predict(found.images, top=top, batch_size=batch_size))


@dataclass(frozen=True)
class Network:
    """A torch or ONNX model."""

    preprocess: Callable[[Pixels], Any]  # right after decoding, so that large photographs do not fill the memory
    probabilities: Callable[[list[Any]], list[list[float]]]  # outputs of ``preprocess`` -> [B, K]
    names: Sequence[str]
    input: InputSpec  # its range and size are those that images are decoded for

    def read(self, path: Path) -> Any:
        """Return the preprocessed image, or the error of one that cannot be decoded."""
        try:
            return self.preprocess(decode(path, self.input.range, decoded_side(self.input)))
        except DataError as error:
            return error


@dataclass(frozen=True)
class Predictor:
    """A network, or a cascade of a student and its teachers.

    Attributes:
        network: the only one, or the student.
        teachers: they answer images that the student is not more confident of than ``threshold``.
        combine: the teachers' probabilities, a list of [B, K] -> [B, K].
        threshold: of the student's largest probability.
    """

    network: Network
    teachers: tuple[Network, ...] = ()
    combine: Callable[[list[list[list[float]]]], list[list[float]]] = lambda rows: rows[0]
    threshold: float = 0.0

    def predict(self, paths: Sequence[Path], *, top: int = 3, batch_size: int = 32) -> Iterator[Prediction]:
        """Yield the prediction of each image, in order; images are decoded in threads, a few batches ahead."""
        names = self.network.names
        images = threaded_map(self.network.read, paths)
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            read = list(itertools.islice(images, len(batch)))
            good = [at for at, image in enumerate(read) if not isinstance(image, DataError)]
            rows = dict(zip(good, self.network.probabilities([read[at] for at in good]), strict=True)) if good else {}
            deferred = [at for at in good if self.teachers and not max(rows[at]) > self.threshold]
            rows |= self._ask_teachers({at: batch[at] for at in deferred})
            for at, path in enumerate(batch):
                if at not in rows:
                    yield Prediction(path, (), str(read[at]))
                    continue
                who = None if not self.teachers else "teacher" if at in deferred else "student"
                yield Prediction(path, _top_classes(rows[at], names, top), None, who)

    def _ask_teachers(self, paths: Mapping[int, Path]) -> dict[int, list[float]]:
        """Return the teachers' probabilities [K] of each image."""
        if not paths:
            return {}
        each = []
        for teacher in self.teachers:
            images = list(threaded_map(teacher.read, paths.values()))
            if errors := [image for image in images if isinstance(image, DataError)]:
                raise errors[0]  # it was read a moment before
            each.append(teacher.probabilities(images))
        return dict(zip(paths, self.combine(each), strict=True))


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

    from potstill.config.recipe import TeachersSettings
    from potstill.experiment.ensembles import average_probabilities

    settings = TeachersSettings.model_validate({"combine": cascade.combine, "weights": cascade.weights})
    student = _open_torch(folder, device, None, note)
    teachers = tuple(_open_torch(folder.parent / name, device, None, note) for name in cascade.teachers)
    for name, teacher in zip(cascade.teachers, teachers, strict=True):
        if tuple(teacher.names) != tuple(student.names):
            raise ArtifactError(f"{folder.parent / name} has other classes than {folder}")

    def combine(each: list[list[list[float]]]) -> list[list[float]]:
        rows: list[list[float]] = average_probabilities([np.asarray(rows) for rows in each], settings).tolist()
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
    from potstill.training.devices import create_compute
    from potstill.training.settings import TrainingSettings

    classifier = (
        load_classifier(model, classes=classes, note=note)[0] if isinstance(model, (str, os.PathLike)) else model
    )
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


def find_images(inputs: Sequence[Path | str], *, follow_links: bool = False) -> FoundImages:
    """Return the given files, and all files in folders that are images by name or signature.

    Args:
        inputs: files and folders.
        follow_links: also read links to folders, and to files outside of a folder.

    Raises:
        UsageError: paths that do not exist (names all).
        DataError: there is no image.
    """
    given = [Path(each).expanduser() for each in inputs]
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise UsageError(f"no such image or folder: {format_names(missing, 3)}")
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
            found.left_out.append((str(path), "no image, by its name and its content"))
    for each in listing.findings:
        if each.kind not in ("name", "empty-class"):
            more = "; --follow-links reads it" if each.kind == "link-out" or each.reason == LINK_TO_FOLDER else ""
            found.left_out.append((str(folder / each.path), each.reason + more))


def _has_image_signature(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    boxed = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or boxed or bitmap


def _top_classes(row: Sequence[float], names: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    # Stable: ties go to the lower class index.
    ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
    return tuple(ranked[:top])
