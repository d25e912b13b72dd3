"""What distillation gained and lost in each class."""

from typing import Any

import numpy as np

from potstill.amounts import NONE, count, percent
from potstill.experiments.verdict.verdict import points
from potstill.report.contents import Run
from potstill.report.predictions import read_predictions

_SHORT = 20  # classes up to which one table shows all
_ENDS = 10  # rows at each end of the short table of more classes


def context(run: Run) -> dict[str, Any] | None:
    """A row for each class: right without and with distillation, and the change; by change where there are many."""
    if not {"baseline", "distilled"} <= set(run.stages):
        return None
    names = run.class_names
    before, after = (run.stages[name].confusion("test", len(names)) for name in ("baseline", "distilled"))
    if before is None or after is None:
        return None
    repaired, broken, paired = _changes(run)
    images = before.sum(axis=1).tolist()
    earlier, later = before.diagonal().tolist(), after.diagonal().tolist()
    changes = [new - old for old, new in zip(earlier, later, strict=True)]
    largest = max(map(abs, changes), default=0) or 1
    rows = [
        {
            "name": names[i],
            "images": count(images[i]),
            "before": _right(earlier[i], images[i]),
            "after": _right(later[i], images[i]),
            "repaired": count(repaired[i]) if paired else NONE,
            "broken": count(broken[i]) if paired else NONE,
            "change": f"{changes[i]:+d}" if changes[i] else "0",
            "points": points(changes[i] / images[i]) if images[i] else NONE,
            "kind": "gain" if changes[i] > 0 else "loss" if changes[i] < 0 else "same",
            "bar": round(100 * abs(changes[i]) / largest, 1),
        }
        for i in range(len(names))
    ]
    order = sorted(range(len(rows)), key=lambda i: -changes[i])
    many = len(rows) > _SHORT
    return {
        "rows": [rows[i] for i in (*order[:_ENDS], *order[-_ENDS:])] if many else rows,
        "all_rows": rows if many else [],
        "ends": _ENDS,
        "better": sum(change > 0 for change in changes),
        "worse": sum(change < 0 for change in changes),
        "same": sum(change == 0 for change in changes),
    }


def _right(right: int, images: int) -> str:
    return f"{count(right)} ({percent(right / images, 0)})" if images else NONE


def _changes(run: Run) -> tuple[list[int], list[int], bool]:
    """Test images of each class that distillation repaired and broke; False where the two files do not go together."""
    before, after = (read_predictions(run.stages[name], "test") for name in ("baseline", "distilled"))
    if before is None or after is None or not before.same_images(after):
        return [], [], False
    # By position: a manifest may list a path twice.
    old, new = before.labels == before.predicted, after.labels == after.predicted
    counts = (np.bincount(before.labels[which], minlength=len(run.class_names)) for which in (~old & new, old & ~new))
    repaired, broken = (each.tolist() for each in counts)
    return repaired, broken, True
