"""Which classes are taken for which."""

from typing import Any

from potstill.amounts import count, percent
from potstill.report.contents import Run, Stage
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.confusion import draw_difference, draw_single, single_size

_MOST = 8  # rows of the table of mistakes
_LARGE = 200  # classes above which only the test matrices go into the page, so that it stays light


def context(run: Run) -> dict[str, Any] | None:
    """Pictures on test; train and val folded; the most frequent mistakes as a table."""
    pictures = {split: _pictures(run, split) for split in ("test", "val", "train")}
    if not any(pictures.values()):
        return None
    return {
        "test": pictures["test"],
        "difference": _difference(run),
        "folded": [(split, pictures[split]) for split in ("val", "train") if pictures[split]],
        "mistakes": _mistakes(run),
        "stages": [stage.name for stage in _with_test(run)],
        "large": len(run.class_names) > 10,
        "left_out": len(run.class_names) > _LARGE,
    }


def _pictures(run: Run, split: str) -> list[str]:
    classes = len(run.class_names)
    if split != "test" and classes > _LARGE:
        return []
    found = []
    for stage in run.stages.values():
        matrix = stage.confusion(split, classes)
        if matrix is not None:
            found.append(_picture(run, stage, split, matrix))
    return found


def _picture(run: Run, stage: Stage, split: str, matrix: list[list[int]]) -> str:
    images, right = sum(map(sum, matrix)), sum(row[i] for i, row in enumerate(matrix))
    label = f"Confusion matrix of {stage.name} on {split}: {count(right)} of {count(images)} images on the diagonal."
    return as_svg(
        lambda figure: draw_single(figure, matrix, run.class_names, f"{stage.name}, {split}"),
        single_size(len(matrix)),
        name=f"confusion-{stage.name}-{split}",
        label=label,
    )


def _difference(run: Run) -> str | None:
    """What distillation changed on test; None where there are not both students."""
    stages = [run.stages.get(name) for name in ("baseline", "distilled")]
    before, after = (stage.confusion("test", len(run.class_names)) if stage else None for stage in stages)
    if before is None or after is None:
        return None
    gained = sum(after[i][i] - before[i][i] for i in range(len(after)))
    return as_svg(
        lambda figure: draw_difference(figure, before, after, run.class_names, "distilled less baseline, test"),
        single_size(len(after)),
        name="confusion-difference",
        label=f"Change of the confusion matrix on test from baseline to distilled: {gained:+d} images on the diagonal.",
    )


def _with_test(run: Run) -> list[Stage]:
    return [stage for stage in run.stages.values() if stage.confusion("test", len(run.class_names))]


def _mistakes(run: Run) -> list[dict[str, Any]]:
    """The pairs that the last stage confuses most often on test, with the counts of every stage."""
    matrices = [stage.confusion("test", len(run.class_names)) or [] for stage in _with_test(run)]
    if not matrices:
        return []
    last = matrices[-1]
    pairs = [(n, i, j) for i, row in enumerate(last) for j, n in enumerate(row) if i != j and n]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return [
        {
            "true": run.class_names[i],
            "said": run.class_names[j],
            "cells": [f"{count(matrix[i][j])} ({percent(matrix[i][j] / sum(last[i]), 0)})" for matrix in matrices],
        }
        for _, i, j in pairs[:_MOST]
    ]
