"""Which classes are taken for which."""

from typing import Any

import numpy as np

from potstill.amounts import count, percent
from potstill.report.contents import Run, Stage
from potstill.report.figures.confusion import Matrix, difference_svg, matrix_svg

_MOST = 8  # rows of the table of mistakes
_LARGE = 200  # classes above which only the test matrices go into the page, so that it stays light


def context(run: Run) -> dict[str, Any] | None:
    """Pictures on test; train and val folded; the most frequent mistakes as a table."""
    pictures = {split: _pictures(run, split) for split in ("test", "val", "train")}
    if not any(pictures.values()):
        return None
    on_test = _with_test(run)
    return {
        "test": pictures["test"],
        "difference": _difference(run),
        "folded": [(split, pictures[split]) for split in ("val", "train") if pictures[split]],
        "mistakes": _mistakes(run, on_test),
        "stages": [name for name, _ in on_test],
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


def _picture(run: Run, stage: Stage, split: str, matrix: Matrix) -> str:
    label = (
        f"Confusion matrix of {stage.name} on {split}: {count(int(matrix.trace()))} of {count(int(matrix.sum()))} "
        "images on the diagonal."
    )
    return matrix_svg(matrix, run.class_names, f"{stage.name}, {split}", label)


def _difference(run: Run) -> str | None:
    """What distillation changed on test; None where there are not both students."""
    stages = [run.stages.get(name) for name in ("baseline", "distilled")]
    before, after = (stage.confusion("test", len(run.class_names)) if stage else None for stage in stages)
    if before is None or after is None:
        return None
    gained = int(after.trace() - before.trace())
    label = f"Change of the confusion matrix on test from baseline to distilled: {gained:+d} images on the diagonal."
    return difference_svg(before, after, run.class_names, "distilled less baseline, test", label)


def _with_test(run: Run) -> list[tuple[str, Matrix]]:
    found = ((stage.name, stage.confusion("test", len(run.class_names))) for stage in run.stages.values())
    return [(name, matrix) for name, matrix in found if matrix is not None]


def _mistakes(run: Run, matrices: list[tuple[str, Matrix]]) -> list[dict[str, Any]]:
    """The pairs that the last stage confuses most often on test, with the counts of every stage."""
    if not matrices:
        return []
    last = matrices[-1][1]
    wrong = last.copy()
    np.fill_diagonal(wrong, 0)
    # Equally frequent ones in the order of their classes.
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST].tolist()
    pairs = [divmod(place, len(last)) for place in order if wrong.flat[place]]
    return [
        {
            "true": run.class_names[i],
            "said": run.class_names[j],
            "cells": [
                f"{count(int(matrix[i, j]))} ({percent(float(matrix[i, j] / last[i].sum()), 0)})"
                for _, matrix in matrices
            ],
        }
        for i, j in pairs
    ]
