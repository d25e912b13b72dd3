"""Which images, and how they were split."""

from typing import Any

from potstill.amounts import NONE, count, number
from potstill.report.contents import SPLITS, Run

_SHORT = 20  # classes up to which the counts are not folded


def context(run: Run) -> dict[str, Any] | None:
    """Where the images came from and how many there are of each class in each split."""
    data = run.data
    if not data:
        return None
    counts = data.get("counts") or {}
    splits = [split for split in SPLITS if isinstance(counts.get(split), dict)]
    names = run.class_names
    rows = [(name, [count(counts[split].get(name, 0)) for split in splits]) for name in names]
    totals = [sum(number(n) or 0 for n in counts[split].values()) for split in splits]
    size = number(data.get("size"))
    before = data.get("source_domain") or {}
    facts = [
        ("Source domain", " · ".join(filter(None, map(before.get, ("source", "origin"))))),
        ("Target domain, of which all figures are" if before else "Source", data.get("source")),
        ("Split", data.get("origin")),
        ("Classes", count(len(names))),
        (
            "Images",
            f"{count(sum(totals))} ({', '.join(f'{s} {count(n)}' for s, n in zip(splits, totals, strict=True))})",
        ),
        ("Size", f"{count(size)} × {count(size)} pixels" if size else None),
        ("Not square", f"{data.get('resize_mode')}: {data['unseen'][0]}" if data.get("unseen") else None),
        ("Left out", f"{count(skipped)}, listed in skipped.csv" if (skipped := number(data.get("skipped"))) else None),
        ("Fingerprint", data.get("fingerprint")),
    ]
    return {
        "facts": [(name, str(value)) for name, value in facts if value not in (None, "", NONE)],
        "splits": splits,
        "rows": rows,
        "totals": [count(total) for total in totals],
        "fold": len(names) > _SHORT,
    }
