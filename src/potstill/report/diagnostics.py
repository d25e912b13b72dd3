"""Training curves, fidelity of each student to its teacher, calibration and cascade; and the errors of each network.

Errors: confusion matrices, metrics by class, and example images with Grad-CAM heat maps.
"""

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.evaluation.cascade import DEFAULT_RISK
from potstill.formatting import MISSING, format_count, format_decimal, format_number, format_percent, format_points
from potstill.report.canvas import FAINT, GRID, RIGHT, ROLE_COLORS, add_legend_below, as_svg, text_color_on
from potstill.report.display_names import shorten
from potstill.report.run_reader import SPLITS, Run, StageResult, read_predictions
from potstill.report.stage_figures import (
    Matrix,
    difference_svg,
    draw_rate,
    draw_stages,
    endpoints,
    matrix_svg,
    stage_curves,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ReliabilityBins = Sequence[Sequence[float]]  # images, mean confidence, accuracy


def draw_reliability(
    figure: "Figure", before: ReliabilityBins, after: ReliabilityBins, title: str, colour: str
) -> None:
    """Draw a reliability diagram before (solid) and after (dashed) scaling; a dot's area shows its number of images."""
    from matplotlib.ticker import PercentFormatter

    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    _plot_bins(axes, before, "unscaled", colour, "-")
    _plot_bins(axes, after, "scaled", FAINT, "--")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.legend(loc="upper left", fontsize=8.5)


def _plot_bins(axes: "Axes", bins: ReliabilityBins, label: str, colour: str, dashes: Any) -> None:
    images = sum(each[0] for each in bins) or 1
    x, y = [each[1] for each in bins], [each[2] for each in bins]
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.5, label=label)
    axes.scatter(x, y, s=[8 + 90 * each[0] / images for each in bins], color=colour, zorder=3, linewidths=0)


_MIN_SIZE = 3.0  # inches


def similarity_size(rows: int, columns: int) -> tuple[float, float]:
    """Return the figure size in inches for ``draw_similarity``."""
    return max(_MIN_SIZE, 0.62 * columns) + 1.0, max(2.2, 0.42 * rows) + 0.9


def draw_similarity(
    figure: "Figure",
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """Draw a heat map of the similarity of each pair of stages, with its numbers."""
    from matplotlib.patches import Rectangle

    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.grid(visible=False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            strength = min(1.0, max(0.0, value or 0.0))
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=RIGHT, alpha=strength, linewidth=0))
            text = "–" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(j, i, text, color=text_color_on(RIGHT, strength), ha="center", va="center")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [shorten(name, 14) for name in rows])
    across = [shorten(name, 14) for name in columns]
    axes.set_xticks(range(len(columns)), across)
    if max(map(len, across), default=0) > 7:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


_WIDE_SIZE, _SMALL_SIZE = (4.9, 3.0), (4.4, 3.3)  # inches


def stages_figure(run: Run) -> str | None:
    """Return a figure of top-1 on val over the epochs of all networks; None if fewer than two were trained."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    if len(trained) < 2:
        return None
    label = f"Line chart: top-1 on val over epochs. {' '.join(endpoints(stage, 'val', 'top1') for stage in trained)}"
    return as_svg(lambda figure: draw_stages(figure, run), _WIDE_SIZE, name="stages", label=label)


def curves_context(run: Run) -> dict[str, Any] | None:
    """Return four figures of each stage."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    return {"stages": [(stage.name, _curve_svgs(run, stage)) for stage in trained]} if trained else None


def _curve_svgs(run: Run, stage: StageResult) -> list[str]:
    pictures = [svg for _, svg in stage_curves(run, stage).values()]
    rates = [rate for record in stage.epochs if (rate := format_number(record.get("lr"))) is not None]
    if rates:
        label = (
            f"Line chart: learning rate of {stage.name}, {rates[0]:g} in the first epoch, {rates[-1]:g} in the last."
        )
        pictures.append(
            as_svg(lambda figure: draw_rate(figure, stage), _SMALL_SIZE, name=f"rate-{stage.name}", label=label)
        )
    return pictures


_RELIABILITY_SIZE = (4.0, 3.6)  # inches
_HIGHEST = 20.0  # temperature that is fitted


def calibration_context(run: Run) -> dict[str, Any] | None:
    """Return a reliability diagram and a row for each stage; None if calibration was not measured."""
    found = [(stage, facts) for stage in run.stages.values() if (facts := _calibration_facts(stage))]
    if not found:
        return None
    return {
        "pictures": [_reliability_svg(stage, facts) for stage, facts in found],
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
    both = [facts.get(key) for key in ("before", "after")]
    return facts if all(isinstance(each, dict) and _valid_rows(each.get("bins"), 3) for each in both) else None


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


def _reliability_svg(stage: StageResult, facts: dict[str, Any]) -> str:
    before, after = facts["before"], facts["after"]
    label = (
        f"Reliability diagram of {stage.name} on test: ECE {format_percent(before.get('ece'))} unscaled, "
        f"{format_percent(after.get('ece'))} after temperature scaling."
    )
    return as_svg(
        lambda figure: draw_reliability(
            figure, before["bins"], after["bins"], f"Reliability: {stage.name}", ROLE_COLORS[stage.role]
        ),
        _RELIABILITY_SIZE,
        name=f"reliability-{stage.name}",
        label=label,
    )


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


_STUDENTS = ("baseline", "distilled")


def fidelity_context(run: Run) -> dict[str, Any] | None:
    """Return agreement and KL divergence of each student on each split, and CKA; None if nothing was measured."""
    rows = []
    for stage in run.stages.values():
        known = {split: stage.metrics.get(split, {}) for split in SPLITS}
        if any(format_number(figures.get("agreement")) is not None for figures in known.values()):
            cells = [
                (format_percent(known[split].get("agreement")), format_decimal(known[split].get("kl_to_teacher")))
                for split in SPLITS
            ]
            rows.append((stage.name, cells))
    cka = run.results.get("cka")
    cka = cka if isinstance(cka, dict) else {}
    pictures = [svg for name in _STUDENTS if (svg := _cka_svg(cka, name))]
    notes = _cka_notes(cka)
    if not rows and not pictures and not notes:
        return None
    images = format_number(cka.get("images"))
    return {
        "splits": SPLITS,
        "rows": rows,
        "pictures": pictures,
        "notes": notes,
        "images": "" if images is None else format_count(images),
        "split": str(cka.get("split") or ""),
    }


def _cka_svg(cka: dict[str, Any], name: str) -> str | None:
    layers, values = cka.get("layers") or {}, (cka.get("values") or {}).get(name)
    down, across = layers.get("teacher"), layers.get(name)
    if not values or not down or not across or [len(row) for row in values] != [len(across)] * len(down):
        return None
    fields = [[format_number(value) for value in row] for row in values]
    best = [max((value for value in row if value is not None), default=None) for row in fields]
    highest = ", ".join(
        f"{format_decimal(value, 2)} for the teacher's {path}" for path, value in zip(down, best, strict=True)
    )
    return as_svg(
        lambda figure: draw_similarity(figure, fields, down, across, f"Teacher (down) and {name} (across)"),
        similarity_size(len(down), len(across)),
        name=f"cka-{name}",
        label=f"CKA between the stages of teacher and {name}; the highest with any stage of {name}: {highest}.",
    )


def _cka_notes(cka: dict[str, Any]) -> list[str]:
    found = []
    if cka.get("failed"):
        found.append(f"The similarity of teacher and student stages could not be measured: {cka['failed']}.")
    for name, paths in (cka.get("left_out") or {}).items():
        found.append(f"Left out, as its feature maps are too large to compare: {name}, {', '.join(map(str, paths))}.")
    return found


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
    """Return a PNG of bytes as a ``data:`` URI, transparent over orange to light yellow; the browser enlarges it."""
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
