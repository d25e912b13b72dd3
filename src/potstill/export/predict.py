"""Predictions for unlabeled images."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.data.concurrency import thread_count, threaded_map
from potstill.data.entries import LINK_TO_FOLDER, has_image_suffix
from potstill.data.image_io import Pixels, decode
from potstill.data.preprocessing import decoded_side
from potstill.data.sources import walk_images
from potstill.errors import DataError, UsageError
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

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        classes = [{"class": name, "probability": probability} for name, probability in self.classes]
        return {"path": str(self.path), "predictions": classes}


def predict(
    model: "Path | str | Classifier",
    inputs: Sequence[Path | str],
    *,
    top: int = 3,
    batch_size: int = 32,
    device: str = "auto",
    classes: str | None = None,
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
        note: is called with a line on each thing that was assumed of bare weights.

    Returns:
        One Prediction for each image, in order; an image that cannot be decoded has ``error`` set and no classes.
        A UserWarning names other files in the folders.

    Raises:
        UsageError: a path that does not exist.
        DataError: there is no image.
        ArtifactError: there is no model, or it is damaged.
    """
    found = find_images(inputs)
    if found.left_out:
        some = "; ".join(f"{path}: {reason}" for path, reason in found.left_out[:3])
        warnings.warn(f"{len(found.left_out)} files are left out, such as {some}", stacklevel=2)
    paths = found.images
    chunks = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    exported = isinstance(model, (str, os.PathLike)) and Path(model).suffix.lower() == ONNX_SUFFIX
    predictor = (
        _create_onnx_predictor(Path(str(model)), device)
        if exported
        else _create_torch_predictor(model, device, classes, note)
    )
    # Decoded ahead, in threads, while the model runs.
    prepared = threaded_map(partial(_prepare, predictor), paths, threads=min(thread_count(), len(paths)))
    return [each for chunk in chunks for each in _predict(predictor, chunk, list(islice(prepared, len(chunk))), top)]


@dataclass(frozen=True)
class _Predictor:
    """A torch or ONNX model."""

    preprocess: Callable[[Pixels], Any]  # right after decoding, so that large photographs do not fill the memory
    probabilities: Callable[[list[Any]], list[list[float]]]  # outputs of ``preprocess`` -> [B, K]
    names: Sequence[str]
    input: InputSpec  # its range and size are those that images are decoded for


def _create_onnx_predictor(path: Path, device: str) -> _Predictor:
    if device not in ("auto", "cpu"):
        raise UsageError(f"an ONNX model runs on the CPU here, got device={device!r}")
    model = load_onnx(path)
    return _Predictor(
        model.prepare,
        lambda images: model.probabilities(images).tolist(),
        model.metadata.class_names,
        model.metadata.input,
    )


def _create_torch_predictor(
    model: "Path | str | Classifier", device: str, classes: str | None, note: Callable[[str], None]
) -> _Predictor:
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
    return _Predictor(lambda pixels: preprocess(pixels, spec), probabilities, classifier.class_names, spec)


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


def _prepare(predictor: _Predictor, path: Path) -> Any:
    """Return the preprocessed image, or the error that it cannot be decoded."""
    try:
        return predictor.preprocess(decode(path, predictor.input.range, decoded_side(predictor.input)))
    except DataError as error:
        return error


def _predict(predictor: _Predictor, paths: Sequence[Path], prepared: Sequence[Any], top: int) -> list[Prediction]:
    images = {i: each for i, each in enumerate(prepared) if not isinstance(each, DataError)}
    errors = {i: str(each) for i, each in enumerate(prepared) if isinstance(each, DataError)}
    rows = dict(zip(images, predictor.probabilities(list(images.values())), strict=True)) if images else {}
    return [
        Prediction(path, (), errors[i])
        if i in errors
        else Prediction(path, _top_classes(rows[i], predictor.names, top))
        for i, path in enumerate(paths)
    ]


def _top_classes(row: Sequence[float], names: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    # Stable: ties go to the lower class index.
    ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
    return tuple(ranked[:top])
