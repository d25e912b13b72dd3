"""examples.json: test images for the report, with the predictions of the networks.

Written after the evaluation, so that the report needs neither torch nor the data set. The images are illustrations;
nothing is selected by them.
"""

import base64
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from potstill.data.image_io import Pixels
from potstill.data.image_sets import ImageSet, read_pixels
from potstill.errors import PotstillError
from potstill.evaluation import Array
from potstill.evaluation.predictions import Predictions

MAX_PER_GROUP = 6  # images


@dataclass(frozen=True)
class ExampleGroup:
    """A group of images: their number, and the positions of the first ones."""

    count: int
    images: tuple[int, ...]


def select_examples(predictions: Mapping[str, Predictions], max_images: int = MAX_PER_GROUP) -> dict[str, ExampleGroup]:
    """Select ``max_images`` of each group, those with the highest score first; ties in the order of the split.

    ``mistakes``: the student is wrong; score: its confidence.  ``disagreements``: student and teacher predict different
    classes; score: the product of their confidences.  ``repaired`` and ``broken``: only the distilled student, or only
    the baseline, is right; score: the change of the true class's probability.

    Example:
        >>> student = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
        >>> select_examples({"student": Predictions.of(student, np.array([0, 0, 0]))}, max_images=1)
        {'mistakes': ExampleGroup(count=2, images=(2,))}
    """
    student = predictions["student"]
    groups = {"mistakes": _select_by_score(~student.correct, student.confidence, max_images)}
    if "teacher" in predictions:
        teacher = predictions["teacher"]
        both = student.confidence * teacher.confidence
        groups["disagreements"] = _select_by_score(student.predicted != teacher.predicted, both, max_images)
    if "baseline" in predictions:
        baseline = predictions["baseline"]
        gain = student.label_probability - baseline.label_probability
        before, after = baseline.correct, student.correct
        groups["repaired"] = _select_by_score(after & ~before, gain, max_images)
        groups["broken"] = _select_by_score(before & ~after, -gain, max_images)
    return groups


def _select_by_score(mask: Array, score: Array, max_images: int) -> ExampleGroup:
    positions = np.flatnonzero(mask)
    order = positions[np.argsort(-score[positions], kind="stable")]
    return ExampleGroup(len(positions), tuple(order[:max_images].tolist()))


THUMBNAIL_SIDE = 120  # pixels of the longer side, at most
_MAX_JPEG_BYTES = 9_000  # 24 such images, in base64, are 0.3 MB
_QUALITIES = (82, 70, 55, 40, 25)


def encode_thumbnail(pixels: Pixels) -> dict[str, Any]:
    """Return ``type``, ``width``, ``height`` and ``data`` (base64) of a PNG of small images, or a JPEG."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small = max(image.size) < THUMBNAIL_SIDE // 2
    content = _png(image) if small else _jpeg(image)
    return {
        "type": "png" if small else "jpeg",
        "width": image.width,
        "height": image.height,
        "data": base64.b64encode(content).decode(),
    }


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _jpeg(image: Image.Image) -> bytes:
    """Return a JPEG of limited size: images that compress badly get a lower quality."""
    content = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= _MAX_JPEG_BYTES:
            break
    return content


SCHEMA = 1
SPLIT = "test"


def describe_examples(
    predictions: Mapping[str, Predictions],
    images: ImageSet,
    class_names: Sequence[str],
) -> dict[str, Any] | None:
    """Return the content of examples.json; None without student or images.  Unreadable images have no thumbnail."""
    student = next((name for name in ("distilled", "baseline") if name in predictions), None)
    if student is None or not len(images):
        return None
    parts = {"student": student, "teacher": "teacher"}
    if student == "distilled":
        parts["baseline"] = "baseline"
    parts = {part: stage for part, stage in parts.items() if stage in predictions}
    labels = images.labels
    groups = select_examples({part: predictions[stage] for part, stage in parts.items()})
    chosen = list(dict.fromkeys(position for group in groups.values() for position in group.images))
    thumbnails = {at: encode_thumbnail(pixels) for at, pixels in _read(images, chosen).items()}
    return {
        "schema": SCHEMA,
        "split": SPLIT,
        "parts": parts,
        "groups": {
            name: {"count": group.count, "images": [str(position) for position in group.images]}
            for name, group in groups.items()
        },
        "images": {
            str(position): {
                "name": images.names[position],
                "class": class_names[labels[position]],
                "predictions": {
                    stage: _describe_prediction(predictions[stage], position, class_names) for stage in parts.values()
                },
                "thumbnail": thumbnails.get(position),
            }
            for position in chosen
        },
    }


def _describe_prediction(found: Predictions, position: int, class_names: Sequence[str]) -> dict[str, Any]:
    probability = round(float(found.confidence[position]), 4)
    return {"class": class_names[int(found.predicted[position])], "probability": probability}


def _read(images: ImageSet, positions: Sequence[int]) -> dict[int, Pixels]:
    """Return the pixels of the images that can be read, by position."""
    pixels: dict[int, Pixels] = {}
    for position in positions:
        with contextlib.suppress(PotstillError):
            pixels[position] = read_pixels(images, position, THUMBNAIL_SIDE)
    return pixels
