"""examples.json: test images for the report, with the predictions and Grad-CAM maps of the networks.

Written once, after the evaluation, so that the report needs neither torch nor the data set. The images illustrate
what was measured; nothing is selected by them.
"""

import base64
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from potstill.data.image_io import Pixels
from potstill.data.image_sets import ImageSet
from potstill.data.transforms import preprocess
from potstill.errors import PotstillError
from potstill.evaluation.classification import Array
from potstill.evaluation.gradcam import grad_cam, visible_region
from potstill.evaluation.predictions import Predictions
from potstill.models.model_file import Classifier

MAX_PER_GROUP = 6  # images of a group


@dataclass(frozen=True)
class ExampleGroup:
    """A group of images: how many there are of the kind, and the positions of the first."""

    count: int
    images: tuple[int, ...]


def select_examples(answers: Mapping[str, Predictions], most: int = MAX_PER_GROUP) -> dict[str, ExampleGroup]:
    """Images by group, the clearest first; of two equally clear ones the earlier in the split.

    ``mistakes``: the student is wrong, by its confidence.  ``disagreements``: student and teacher name different
    classes, by the product of their confidences.  ``repaired`` and ``broken``: only distilled, or only the baseline,
    is right, by how much the probability of the true class changed.

    Args:
        answers: ``student`` (required), ``teacher``, ``baseline`` -> what was predicted for the same images.
        most: images of a group.

    Returns:
        group -> what was found; a group that needs a network which is not there is left out.

    Example:
        >>> student = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
        >>> select_examples({"student": Predictions.of(student, np.array([0, 0, 0]))}, most=1)
        {'mistakes': ExampleGroup(count=2, images=(2,))}
    """
    student = answers["student"]
    found = {"mistakes": _clearest(~student.correct, student.confidence, most)}
    if "teacher" in answers:
        teacher = answers["teacher"]
        both = student.confidence * teacher.confidence
        found["disagreements"] = _clearest(student.predicted != teacher.predicted, both, most)
    if "baseline" in answers:
        baseline = answers["baseline"]
        gain = student.label_probability - baseline.label_probability
        before, after = baseline.correct, student.correct
        found["repaired"] = _clearest(after & ~before, gain, most)
        found["broken"] = _clearest(before & ~after, -gain, most)
    return found


def _clearest(wanted: Array, clarity: Array, most: int) -> ExampleGroup:
    places = np.flatnonzero(wanted)
    order = places[np.argsort(-clarity[places], kind="stable")]
    return ExampleGroup(len(places), tuple(order[:most].tolist()))


THUMBNAIL_SIDE = 120  # pixels of the longer side at most
_MAX_JPEG_BYTES = 9_000  # of a picture: 24 of them, in base64, are 0.3 MB of a page
_QUALITIES = (82, 70, 55, 40, 25)


def encode_thumbnail(pixels: Pixels) -> dict[str, Any]:
    """A PNG of images of a few pixels, which a browser can enlarge without blur, else a JPEG.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        ``type`` ("png" or "jpeg"), ``width``, ``height`` of the picture in pixels, ``data`` in base64.
    """
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
    """Of noise, which compresses badly, a worse picture rather than a larger one."""
    content = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= _MAX_JPEG_BYTES:
            break
    return content


SCHEMA = 1
SPLIT = "test"  # what the verdict, and its numbers of repaired and broken images, are about
_CAM_BATCH = 8  # images at once through a network whose gradients are wanted
_MAX_CAM_SIDE = 14  # rows and columns of a heat map at most


def describe_examples(
    models: dict[str, Classifier], answers: dict[str, Predictions], images: ImageSet, class_names: Sequence[str]
) -> dict[str, Any] | None:
    """What examples.json holds; None where there is no student, or no image.

    Whatever stands in the way of a picture or a heat map is noted in its place: a run does not fail for want of an
    illustration.

    Args:
        models: by stage; of several teachers the first one counts.
        answers: by stage, what it predicted for ``images``.
        images: of the test split.
        class_names: of the K columns.
    """
    student = next((name for name in ("distilled", "baseline") if name in models), None)
    if student is None or not len(images):
        return None
    parts = {"student": student, "teacher": "teacher"}
    if student == "distilled":
        parts["baseline"] = "baseline"
    parts = {part: stage for part, stage in parts.items() if stage in models}
    labels = images.labels
    groups = select_examples({part: answers[stage] for part, stage in parts.items()})
    chosen = list(dict.fromkeys(place for group in groups.values() for place in group.images))
    pixels = _read_pixels(images, chosen)
    looks, failed = _heat_maps(
        {stage: models[stage] for stage in (student, parts.get("teacher")) if stage}, answers, pixels
    )
    return {
        "schema": SCHEMA,
        "split": SPLIT,
        "parts": parts,
        "groups": {
            name: {"count": group.count, "images": [str(place) for place in group.images]}
            for name, group in groups.items()
        },
        "images": {
            str(place): {
                "name": images.names[place],
                "class": class_names[labels[place]],
                "said": {stage: _describe_prediction(answers[stage], place, class_names) for stage in parts.values()},
                "thumbnail": encode_thumbnail(pixels[place]) if place in pixels else None,
                "looks": looks.get(place, {}),
            }
            for place in chosen
        },
        "failed": failed,
    }


def _describe_prediction(found: Predictions, place: int, class_names: Sequence[str]) -> dict[str, Any]:
    probability = round(float(found.confidence[place]), 4)
    return {"class": class_names[int(found.predicted[place])], "probability": probability}


def _read_pixels(images: ImageSet, places: Sequence[int]) -> dict[int, Pixels]:
    """Pixels by position, of those that can be read now."""
    pixels: dict[int, Pixels] = {}
    for place in places:
        with contextlib.suppress(PotstillError):
            pixels[place] = images.pixels(place)
    return pixels


def _heat_maps(
    models: dict[str, Classifier], answers: dict[str, Predictions], pixels: dict[int, Pixels]
) -> tuple[dict[int, dict[str, Any]], dict[str, str]]:
    """Heat maps: position -> stage -> ``rows`` (two hex digits a field) and ``region``; and stage -> why none."""
    looks: dict[int, dict[str, Any]] = {place: {} for place in pixels}
    failed: dict[str, str] = {}
    places = list(pixels)
    for stage, model in models.items():
        wanted = answers[stage].predicted
        try:
            for start in range(0, len(places), _CAM_BATCH):
                some = places[start : start + _CAM_BATCH]
                maps = _grad_cam(model, [pixels[place] for place in some], [int(wanted[place]) for place in some])
                for place, rows in zip(some, maps.tolist(), strict=True):
                    height, width = pixels[place].shape[:2]
                    looks[place][stage] = {
                        "rows": [bytes(row).hex() for row in rows],
                        "region": visible_region(height, width, model.input),
                    }
        except (PotstillError, RuntimeError) as error:  # RuntimeError: of torch, no memory among them
            failed[stage] = str(error).splitlines()[0] if str(error) else type(error).__name__
            for each in looks.values():
                each.pop(stage, None)
    return looks, failed


def _grad_cam(model: Classifier, pixels: Sequence[Pixels], classes: Sequence[int]) -> Tensor:
    """uint8 [B, h, w]."""
    device = next(model.module.parameters()).device
    images = torch.stack([preprocess(each, model.input) for each in pixels]).to(device)
    maps = grad_cam(model.module, images, classes)
    if max(maps.shape[1:]) > _MAX_CAM_SIDE:
        maps = F.adaptive_avg_pool2d(
            maps[None], (min(_MAX_CAM_SIDE, maps.shape[1]), min(_MAX_CAM_SIDE, maps.shape[2]))
        )[0]
    return (255 * maps).nan_to_num().round().to(torch.uint8).cpu()
