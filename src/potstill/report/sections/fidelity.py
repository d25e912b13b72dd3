"""How closely each student follows its teacher, whether right or wrong."""

from typing import Any

from potstill.amounts import decimal, number, percent
from potstill.report.contents import SPLITS, Run


def context(run: Run) -> dict[str, Any] | None:
    """A row for each student: agreement and KL divergence on each split; None where no figure is known."""
    rows = []
    for stage in run.stages.values():
        known = {split: stage.metrics.get(split, {}) for split in SPLITS}
        if any(number(figures.get("agreement")) is not None for figures in known.values()):
            cells = [
                (percent(known[split].get("agreement")), decimal(known[split].get("kl_to_teacher"))) for split in SPLITS
            ]
            rows.append((stage.name, cells))
    return {"splits": SPLITS, "rows": rows} if rows else None
