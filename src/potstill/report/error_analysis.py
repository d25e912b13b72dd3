"""Error analysis: confusion matrices, metrics by class, and example images with Grad-CAM heat maps."""

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from potstill.formatting import MISSING, format_count, format_number, format_percent, format_points
from potstill.report.confusion_matrix import Matrix, difference_svg, matrix_svg
from potstill.report.run_reader import Run, StageResult, read_predictions

_MAX_MISTAKES = 8  # rows of the table of mistakes
_MAX_FOLDED_CLASSES = 200  # above, the page has only the test matrices, to stay small


def confusion_context(run: Run) -> dict[str, Any] | None:
    """Return the matrices on test, those on train and val (folded), and the most frequent mistakes."""
    pictures = {split: _stage_matrix_svgs(run, split) for split in ("test", "val", "train")}
    if not any(pictures.values()):
        return None
    on_test = _test_matrices(run)
    return {
        "test": pictures["test"],
        "difference": _students_difference_svg(run),
        "folded": [(split, pictures[split]) for split in ("val", "train") if pictures[split]],
        "mistakes": _frequent_mistakes(run, on_test),
        "stages": [name for name, _ in on_test],
        "large": len(run.class_names) > 10,
        "left_out": len(run.class_names) > _MAX_FOLDED_CLASSES,
    }


def _stage_matrix_svgs(run: Run, split: str) -> list[str]:
    classes = len(run.class_names)
    if split != "test" and classes > _MAX_FOLDED_CLASSES:
        return []
    found = []
    for stage in run.stages.values():
        matrix = stage.confusion(split, classes)
        if matrix is not None:
            found.append(_stage_matrix_svg(run, stage, split, matrix))
    return found


def _stage_matrix_svg(run: Run, stage: StageResult, split: str, matrix: Matrix) -> str:
    label = (
        f"Confusion matrix of {stage.name} on {split}: {format_count(int(matrix.trace()))} of "
        f"{format_count(int(matrix.sum()))} "
        "images on the diagonal."
    )
    return matrix_svg(matrix, run.class_names, f"{stage.name}, {split}", label)


def _students_difference_svg(run: Run) -> str | None:
    """Return the difference of both students on test; None if one is missing."""
    stages = [run.stages.get(name) for name in ("baseline", "distilled")]
    before, after = (stage.confusion("test", len(run.class_names)) if stage else None for stage in stages)
    if before is None or after is None:
        return None
    gained = int(after.trace() - before.trace())
    label = f"Change of the confusion matrix on test from baseline to distilled: {gained:+d} images on the diagonal."
    return difference_svg(before, after, run.class_names, "distilled − baseline, test", label)


def _test_matrices(run: Run) -> list[tuple[str, Matrix]]:
    found = ((stage.name, stage.confusion("test", len(run.class_names))) for stage in run.stages.values())
    return [(name, matrix) for name, matrix in found if matrix is not None]


def _frequent_mistakes(run: Run, matrices: list[tuple[str, Matrix]]) -> list[dict[str, Any]]:
    """Return the pairs of classes that the last stage confuses most often on test, with the counts of every stage."""
    if not matrices:
        return []
    last = matrices[-1][1]
    wrong = last.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_MISTAKES].tolist()  # ties in order of the classes
    pairs = [divmod(position, len(last)) for position in order if wrong.flat[position]]
    return [
        {
            "true": run.class_names[i],
            "predicted": run.class_names[j],
            "cells": [
                f"{format_count(int(matrix[i, j]))} ({format_percent(float(matrix[i, j] / last[i].sum()), 0)})"
                for _, matrix in matrices
            ],
        }
        for i, j in pairs
    ]


_MAX_CLASS_ROWS = 20  # classes up to which one table shows all
_END_ROWS = 10  # rows at each end of the short table of more classes


def classes_context(run: Run) -> dict[str, Any] | None:
    """Return a row for each class: correct images of both students and the change; the extremes for many classes."""
    if not {"baseline", "distilled"} <= set(run.stages):
        return None
    names = run.class_names
    before, after = (run.stages[name].confusion("test", len(names)) for name in ("baseline", "distilled"))
    if before is None or after is None:
        return None
    newly_right, newly_wrong, paired = _changes_per_class(run)
    images = before.sum(axis=1).tolist()
    earlier, later = before.diagonal().tolist(), after.diagonal().tolist()
    changes = [new - old for old, new in zip(earlier, later, strict=True)]
    largest = max(map(abs, changes), default=0) or 1
    rows = [
        {
            "name": names[i],
            "images": format_count(images[i]),
            "before": _format_correct(earlier[i], images[i]),
            "after": _format_correct(later[i], images[i]),
            "newly_right": format_count(newly_right[i]) if paired else MISSING,
            "newly_wrong": format_count(newly_wrong[i]) if paired else MISSING,
            "change": f"{changes[i]:+d}" if changes[i] else "0",
            "points": format_points(changes[i] / images[i]) if images[i] else MISSING,
            "kind": "gain" if changes[i] > 0 else "loss" if changes[i] < 0 else "same",
            "bar": round(100 * abs(changes[i]) / largest, 1),
        }
        for i in range(len(names))
    ]
    order = sorted(range(len(rows)), key=lambda i: -changes[i])
    many = len(rows) > _MAX_CLASS_ROWS
    return {
        "rows": [rows[i] for i in (*order[:_END_ROWS], *order[-_END_ROWS:])] if many else rows,
        "all_rows": rows if many else [],
        "ends": _END_ROWS,
        "better": sum(change > 0 for change in changes),
        "worse": sum(change < 0 for change in changes),
        "same": sum(change == 0 for change in changes),
    }


def _format_correct(right: int, images: int) -> str:
    return f"{format_count(right)} ({format_percent(right / images, 0)})" if images else MISSING


def _changes_per_class(run: Run) -> tuple[list[int], list[int], bool]:
    """Return newly right and newly wrong test images by class, and whether both predictions are of the same images."""
    before, after = (read_predictions(run.stages[name], "test") for name in ("baseline", "distilled"))
    if before is None or after is None or not before.same_images(after):
        return [], [], False
    # By position: a manifest may list a path twice.
    old, new = before.labels == before.predicted, after.labels == after.predicted
    counts = (np.bincount(before.labels[which], minlength=len(run.class_names)) for which in (~old & new, old & ~new))
    newly_right, newly_wrong = (each.tolist() for each in counts)
    return newly_right, newly_wrong, True


_HEAT_ALPHA = 0.84  # of the maximum


def heatmap_uri(rows: Sequence[bytes]) -> str:
    """Return a PNG with a pixel per value as a ``data:`` URI; the browser enlarges and smooths it.

    Colours go from transparent over orange to light yellow: lighter is more, also for colour-blind readers.

    Args:
        rows: h of w bytes, 0 to 255.
    """
    from PIL import Image

    pixels = b"".join(bytes(_heat_color(value / 255)) for row in rows for value in row)
    file = io.BytesIO()
    Image.frombytes("RGBA", (len(rows[0]), len(rows)), pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _heat_color(value: float) -> tuple[int, int, int, int]:
    return 255, round(80 + 160 * value), round(30 + 120 * value * value), round(255 * _HEAT_ALPHA * value)


_GROUP_TITLES = {
    "mistakes": "The most confident mistakes of {student}",
    "disagreements": "Where {student} and {teacher} disagree",
    "repaired": "Newly right with distillation",
    "broken": "Newly wrong with distillation",
}
_GROUP_KINDS = {
    "mistakes": "wrong predictions, the most confident first",
    "disagreements": "images with different predictions, the most confident first",
    "repaired": "images that baseline gets wrong and distilled right, the largest change first",
    "broken": "images that baseline gets right and distilled wrong, the largest change first",
}
_MAX_REGION = 4096.0  # of a heat map, in sides of the image: with padding, larger than the image
_IMAGE_TYPES = ("png", "jpeg")


def images_context(run: Run) -> dict[str, Any] | None:
    """Return groups of images with heat maps; None if the run kept none."""
    examples = run.examples
    if examples is None or not isinstance(examples.get("groups"), dict):
        return None
    parts, images = examples.get("parts") or {}, examples.get("images") or {}
    groups = [
        _image_group(name, found, images, parts) for name, found in examples["groups"].items() if name in _GROUP_TITLES
    ]
    shown = [card for group in groups for card in group["cards"]]
    pictures = {card["key"]: card["picture"] for card in shown if card["picture"]}
    return {
        "split": str(examples.get("split")),
        "groups": groups,
        "pictures": pictures,
        "looking": any(each["heat"] for card in shown for each in card["heat_maps"]),
        "notes": list(_image_notes(run, examples, shown)),
    }


def _image_group(name: str, found: dict[str, Any], images: dict[str, Any], parts: dict[str, str]) -> dict[str, Any]:
    keys = [str(key) for key in found.get("images") or []]
    return {
        "title": _GROUP_TITLES[name].format(student=parts.get("student", "the student"), teacher=parts.get("teacher")),
        "kind": _GROUP_KINDS[name],
        "count": format_count(found.get("count")),
        "none": not format_number(found.get("count")),
        "all": format_number(found.get("count")) == len(keys),
        "cards": [_image_card(key, images[key], parts) for key in keys if isinstance(images.get(key), dict)],
    }


def _image_card(key: str, image: dict[str, Any], parts: dict[str, str]) -> dict[str, Any]:
    predictions = image.get("predictions") or {}
    true = str(image.get("class"))
    answers = []
    for stage in dict.fromkeys(parts[part] for part in ("teacher", "baseline", "student") if part in parts):
        answer = predictions.get(stage) or {}
        named = str(answer.get("class", MISSING))
        answers.append((stage, named, format_percent(answer.get("probability")), "right" if named == true else "wrong"))
    picture = _thumbnail(image.get("thumbnail"))
    heat_maps = image.get("gradcam") or {}
    return {
        "key": key,
        "name": str(image.get("name")),
        "class": true,
        "answers": answers,
        "picture": picture,
        "heat_maps": [
            _heatmap(stage, named, heat_maps.get(stage)) for stage, named, _, _ in answers if stage in heat_maps
        ]
        if picture
        else [],
    }


def _thumbnail(found: Any) -> dict[str, Any] | None:
    """Return ``uri``, ``width``, ``height`` and whether to enlarge without blur; None if there is no image."""
    if not isinstance(found, dict) or found.get("type") not in _IMAGE_TYPES:
        return None
    width, height = (format_number(found.get(side)) for side in ("width", "height"))
    try:
        data = base64.b64encode(base64.b64decode(str(found.get("data")), validate=True)).decode()
    except binascii.Error:
        return None
    if not width or not height or not data:
        return None
    uri = f"data:image/{found['type']};base64,{data}"
    return {"uri": uri, "width": int(width), "height": int(height), "small": found["type"] == "png"}


def _heatmap(stage: str, named: str, found: Any) -> dict[str, Any]:
    """Return the heat map of ``stage`` for its predicted class, and the region of the image that it covers."""
    try:
        rows = [bytes.fromhex(row) for row in found["rows"]]
        left, top, width, height = (
            100 * min(_MAX_REGION, max(-_MAX_REGION, float(share))) for share in found["region"]
        )
    except (KeyError, TypeError, ValueError):
        rows, left, top, width, height = [], 0.0, 0.0, 100.0, 100.0
    valid = bool(rows and rows[0]) and len({len(row) for row in rows}) == 1
    return {
        "stage": stage,
        "named": named,
        "heat": heatmap_uri(rows) if valid and any(map(any, rows)) else None,
        "place": [f"{each:g}%" for each in (left, top, width, height)],
    }


def _image_notes(run: Run, examples: dict[str, Any], shown: list[dict[str, Any]]) -> Iterator[str]:
    for stage, reason in (examples.get("failed") or {}).items():
        yield f"No heat maps of {stage}: {reason}."
    missing = len({card["key"] for card in shown if not card["picture"]})
    if missing:
        yield (
            f"{'One image has' if missing == 1 else f'{missing} images have'} no picture: the file could no longer be "
            "read when the run ended."
        )
    if sum(stage.role == "teacher" for stage in run.stages.values()) > 1:
        yield "Of several teachers, the first is shown."
