"""Training curves, fidelity of each student to its teacher, calibration and cascade; and the errors of each network.

Errors: confusion matrices, metrics by class, and example images.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.evaluation.cascade import DEFAULT_RISK
from potstill.formatting import MISSING, format_count, format_decimal, format_number, format_percent, format_points
from potstill.report.canvas import FAINT, ROLE_COLORS, add_legend_below, as_svg
from potstill.report.run_reader import SPLITS, Run, StageResult, read_predictions
from potstill.report.stage_figures import (
    Matrix,
    draw_stages,
    endpoints,
    matrix_svg,
    stage_curves,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_WIDE_SIZE = (4.9, 3.0)  # inches


def stages_figure(run: Run) -> str | None:
    """Return a figure of top-1 on val over the epochs of all networks; None if fewer than two were trained."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    if len(trained) < 2:
        return None
    label = f"Line chart: top-1 on val over epochs. {' '.join(endpoints(stage, 'val', 'top1') for stage in trained)}"
    return as_svg(lambda figure: draw_stages(figure, run), _WIDE_SIZE, name="stages", label=label)


def curves_context(run: Run) -> dict[str, Any] | None:
    """Return three figures of each stage."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    stages = [(stage.name, [svg for _, svg in stage_curves(run, stage).values()]) for stage in trained]
    return {"stages": stages} if stages else None


_HIGHEST = 20.0  # temperature that is fitted


def calibration_context(run: Run) -> dict[str, Any] | None:
    """Return a row for each stage; None if calibration was not measured."""
    found = [(stage, facts) for stage in run.stages.values() if (facts := _calibration_facts(stage))]
    if not found:
        return None
    return {
        "rows": [(stage.name, _calibration_cells(facts)) for stage, facts in found],
        "notes": [note for stage, facts in found if (note := _temperature_note(stage.name, facts))],
    }


def _temperature_note(name: str, facts: dict[str, Any]) -> str | None:
    """Return a note if the temperature is in the network's logits, or at the end of its range."""
    temperature = facts["temperature"]
    if facts.get("applied"):
        return f"The last layer of {name} is divided by this temperature, so its predictions and exports are scaled."
    if temperature >= 0.99 * _HIGHEST:
        return f"{name} is no better than chance on val: its fitted temperature is the maximum, {_HIGHEST:g}."
    return None


def _calibration_facts(stage: StageResult) -> dict[str, Any] | None:
    facts = stage.facts.get("calibration")
    if not isinstance(facts, dict) or format_number(facts.get("temperature")) is None:
        return None
    return facts if all(isinstance(facts.get(key), dict) for key in ("before", "after")) else None


def _valid_rows(rows: Any, columns: int) -> bool:
    """Return whether a value of results.json is a list of rows of so many finite numbers."""
    return isinstance(rows, list) and all(
        isinstance(each, list) and len(each) == columns and all(format_number(value) is not None for value in each)
        for each in rows
    )


def _calibration_cells(facts: dict[str, Any]) -> list[str]:
    before, after = facts["before"], facts["after"]
    figures = [
        form(each.get(key))
        for key, form in (("ece", format_percent), ("nll", format_decimal))
        for each in (before, after)
    ]
    return [f"{facts['temperature']:.3g}", *figures]


_CASCADE_SIZE = (5.2, 3.2)  # inches


def draw_cascade(figure: "Figure", curve: Sequence[Sequence[float]], marks: Sequence[Sequence[float]]) -> None:
    """Draw top-1 against the share of images that the teacher answers; ``marks``: (risk, share, top-1) each."""
    from matplotlib.ticker import PercentFormatter

    axes: Axes = figure.subplots()
    axes.set_title("Cascade on test")
    ends = [curve[0], curve[-1]]
    axes.plot(*zip(*ends, strict=True), color=FAINT, linewidth=1, linestyle=(0, (2, 2)), label="images at random")
    axes.plot(*zip(*curve, strict=True), color=ROLE_COLORS["distilled"], linewidth=1.5, label="least confident first")
    if marks:
        risks, x, y = zip(*marks, strict=True)
        axes.scatter(x, y, color=ROLE_COLORS["teacher"], zorder=3, label="promised risk")
        for risk, at, top1 in zip(risks, x, y, strict=True):
            axes.annotate(f"{100 * risk:g} %", (at, top1), xytext=(4, -11), textcoords="offset points", color=FAINT)
    axes.set_xlabel("answered by the teacher")
    axes.set_ylabel("top-1")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1, symbol=" %"))
    add_legend_below(figure, axes)


def cascade_context(run: Run) -> dict[str, Any] | None:
    """Return the curve of the cascade and a row for each promised risk; None if there is no cascade."""
    facts = run.results.get("cascade")
    facts = facts if isinstance(facts, dict) else {}
    curve, rows = facts.get("curve"), facts.get("risks")
    if not curve or not _valid_rows(curve, 2) or not isinstance(rows, list):
        return None
    student, teachers = str(facts.get("student")), [str(name) for name in facts.get("teachers") or ()]
    kept = [row for row in rows if isinstance(row, dict) and format_number(row.get("risk")) is not None]
    marks = [
        [row["risk"], row["deferred"], row["top1"]]
        for row in kept
        if all(format_number(row.get(key)) is not None for key in ("deferred", "top1"))
    ]
    smallest = format_number(facts.get("smallest_risk")) or 0
    label = (
        f"Line chart: top-1 of the cascade on test, from {format_percent(curve[0][1])} with {student} alone to "
        f"{format_percent(curve[-1][1])} with the teacher alone."
    )
    return {
        "picture": as_svg(
            lambda figure: draw_cascade(figure, curve, marks), _CASCADE_SIZE, name="cascade", label=label
        ),
        "student": student,
        "student_top1": format_percent(curve[0][1]),
        "teacher_top1": format_percent(curve[-1][1]),
        "images": format_count(facts.get("calibration_images")),
        "candidates": format_count(facts.get("candidates")),
        "several": (format_number(facts.get("candidates")) or 1) > 1,
        "confidence": format_percent(facts.get("confidence"), 0),
        "smallest": f"{100 * smallest:g} %",
        "risk": f"{max(DEFAULT_RISK, smallest):g}",
        "rows": [(f"{100 * row['risk']:g} %", _cascade_cells(run, student, teachers, row)) for row in kept],
        "latency": _cascade_latency(run, student, teachers, 0.0) is not None,
        "path": run.shown_path,
    }


def _cascade_cells(run: Run, student: str, teachers: Sequence[str], row: dict[str, Any]) -> list[str]:
    if format_number(row.get("threshold")) is None:
        return ["cannot be promised", *[MISSING] * 4]
    ends = f" ({format_percent(row.get('lost_low'))} to {format_percent(row.get('lost_high'))})"
    latency = _cascade_latency(run, student, teachers, format_number(row.get("deferred")) or 0.0)
    return [
        format_decimal(row["threshold"], 3),
        format_percent(row.get("deferred")),
        format_percent(row.get("lost")) + ends,
        format_percent(row.get("top1")),
        MISSING if latency is None else f"{latency:.2f} ms",
    ]


def _cascade_latency(run: Run, student: str, teachers: Sequence[str], deferred: float) -> float | None:
    """Return the mean latency of an image in milliseconds: the student's, and the share of the teachers'."""
    each = [format_number(run.stages[name].latency.get("p50")) for name in (student, *teachers) if name in run.stages]
    known = [value for value in each if value is not None]
    return known[0] + deferred * sum(known[1:]) if len(known) == 1 + len(teachers) else None


def fidelity_context(run: Run) -> dict[str, Any] | None:
    """Return agreement and KL divergence of each student on each split; None if nothing was measured."""
    rows = []
    for stage in run.stages.values():
        known = {split: stage.metrics.get(split, {}) for split in SPLITS}
        if any(format_number(figures.get("agreement")) is not None for figures in known.values()):
            cells = [
                (format_percent(known[split].get("agreement")), format_decimal(known[split].get("kl_to_teacher")))
                for split in SPLITS
            ]
            rows.append((stage.name, cells))
    return {"splits": SPLITS, "rows": rows} if rows else None


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


_GROUP_TITLES = {
    "mistakes": "The most confident mistakes of {student}",
    "disagreements": "Where {student} and {teacher} disagree",
    "repaired": "Newly right with distillation",
    "broken": "Newly wrong with distillation",
}
_GROUP_KINDS = {  # what is counted, and the order
    "mistakes": ("wrong prediction", "wrong predictions", ", the most confident first"),
    "disagreements": (
        "image with different predictions",
        "images with different predictions",
        ", the most confident first",
    ),
    "repaired": ("image", "images", " that baseline gets wrong and distilled right, the largest change first"),
    "broken": ("image", "images", " that baseline gets right and distilled wrong, the largest change first"),
}
_IMAGE_TYPES = ("png", "jpeg")


def images_context(run: Run) -> dict[str, Any] | None:
    """Return groups of images; None if the run kept none."""
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
        "notes": list(_image_notes(run, shown)),
    }


def _image_group(name: str, found: dict[str, Any], images: dict[str, Any], parts: dict[str, str]) -> dict[str, Any]:
    keys = [str(key) for key in found.get("images") or []]
    return {
        "title": _GROUP_TITLES[name].format(student=parts.get("student", "the student"), teacher=parts.get("teacher")),
        "counted": _count_images(format_number(found.get("count")), *_GROUP_KINDS[name]),
        "none": not format_number(found.get("count")),
        "all": format_number(found.get("count")) == len(keys),
        "cards": [_image_card(key, images[key], parts) for key in keys if isinstance(images.get(key), dict)],
    }


def _count_images(count: float | None, one: str, many: str, order: str) -> str:
    if count == 1:
        return f"1 {one}{order.partition(', ')[0]}"  # one has no order
    return f"{format_count(count)} {many}{order}"


def _image_card(key: str, image: dict[str, Any], parts: dict[str, str]) -> dict[str, Any]:
    predictions = image.get("predictions") or {}
    true = str(image.get("class"))
    answers = []
    for stage in dict.fromkeys(parts[part] for part in ("teacher", "baseline", "student") if part in parts):
        answer = predictions.get(stage) or {}
        named = str(answer.get("class", MISSING))
        answers.append((stage, named, format_percent(answer.get("probability")), "right" if named == true else "wrong"))
    picture = _thumbnail(image.get("thumbnail"))
    return {
        "key": key,
        "name": str(image.get("name")),
        "class": true,
        "answers": answers,
        "picture": picture,
    }


def _thumbnail(found: Any) -> dict[str, Any] | None:
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


def _image_notes(run: Run, shown: list[dict[str, Any]]) -> Iterator[str]:
    missing = len({card["key"] for card in shown if not card["picture"]})
    if missing:
        yield (
            f"{'One image has' if missing == 1 else f'{missing} images have'} no picture: the file could no longer be "
            "read when the run ended."
        )
    if sum(stage.role == "teacher" for stage in run.stages.values()) > 1:
        yield "Of several teachers, the first is shown."
