"""examples.json: test images that are worth a look, with what the networks said of them and where they looked.

Made once, behind the evaluation, so that the report can show them without torch and without the data set.  They
illustrate what was measured; nothing is chosen by them.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.decode import Pixels
from potstill.data.images import ImageSet
from potstill.data.preprocess import prepare
from potstill.errors import PotstillError
from potstill.evaluation.gradcam import grad_cam, seen_region
from potstill.evaluation.predictions import Predictions
from potstill.experiments.gallery.picking import pick
from potstill.experiments.gallery.thumbnail import thumbnail
from potstill.models.classifier import Classifier

SCHEMA = 1
SPLIT = "test"  # what the verdict, and its numbers of repaired and broken images, are about
_TOGETHER = 8  # images at once through a network whose gradients are wanted
_FINEST = 14  # rows and columns of a heat map at most


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
    groups = pick({part: answers[stage] for part, stage in parts.items()})
    chosen = list(dict.fromkeys(place for group in groups.values() for place in group.images))
    pixels = _read(images, chosen)
    looks, failed = _looks(
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
                "said": {stage: _said(answers[stage], place, class_names) for stage in parts.values()},
                "thumbnail": thumbnail(pixels[place]) if place in pixels else None,
                "looks": looks.get(place, {}),
            }
            for place in chosen
        },
        "failed": failed,
    }


def _said(found: Predictions, place: int, class_names: Sequence[str]) -> dict[str, Any]:
    probability = round(float(found.confidence[place]), 4)
    return {"class": class_names[int(found.predicted[place])], "probability": probability}


def _read(images: ImageSet, places: Sequence[int]) -> dict[int, Pixels]:
    """Pixels by position, of those that can be read now."""
    pixels: dict[int, Pixels] = {}
    for place in places:
        with contextlib.suppress(PotstillError):
            pixels[place] = images.pixels(place)
    return pixels


def _looks(
    models: dict[str, Classifier], answers: dict[str, Predictions], pixels: dict[int, Pixels]
) -> tuple[dict[int, dict[str, Any]], dict[str, str]]:
    """Heat maps: position -> stage -> ``rows`` (two hex digits a field) and ``region``; and stage -> why none."""
    looks: dict[int, dict[str, Any]] = {place: {} for place in pixels}
    failed: dict[str, str] = {}
    places = list(pixels)
    for stage, model in models.items():
        wanted = answers[stage].predicted
        try:
            for start in range(0, len(places), _TOGETHER):
                some = places[start : start + _TOGETHER]
                maps = _heat(model, [pixels[place] for place in some], [int(wanted[place]) for place in some])
                for place, rows in zip(some, maps.tolist(), strict=True):
                    height, width = pixels[place].shape[:2]
                    looks[place][stage] = {
                        "rows": [bytes(row).hex() for row in rows],
                        "region": seen_region(height, width, model.input),
                    }
        except (PotstillError, RuntimeError) as error:  # RuntimeError: of torch, no memory among them
            failed[stage] = str(error).splitlines()[0] if str(error) else type(error).__name__
            for each in looks.values():
                each.pop(stage, None)
    return looks, failed


def _heat(model: Classifier, pixels: Sequence[Pixels], classes: Sequence[int]) -> Tensor:
    """uint8 [B, h, w]."""
    device = next(model.module.parameters()).device
    images = torch.stack([prepare(each, model.input) for each in pixels]).to(device)
    maps = grad_cam(model.module, images, classes)
    if max(maps.shape[1:]) > _FINEST:
        maps = F.adaptive_avg_pool2d(maps[None], (min(_FINEST, maps.shape[1]), min(_FINEST, maps.shape[2])))[0]
    return (255 * maps).nan_to_num().round().to(torch.uint8).cpu()
