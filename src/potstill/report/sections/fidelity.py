"""How closely each student follows its teacher, whether right or wrong."""

from typing import Any

from potstill.amounts import count, decimal, number, percent
from potstill.report.contents import SPLITS, Run
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.similarity import draw_similarity, similarity_size

_STUDENTS = ("baseline", "distilled")


def context(run: Run) -> dict[str, Any] | None:
    """A row for each student: agreement and KL divergence on each split; then CKA.  None where nothing is known."""
    rows = []
    for stage in run.stages.values():
        known = {split: stage.metrics.get(split, {}) for split in SPLITS}
        if any(number(figures.get("agreement")) is not None for figures in known.values()):
            cells = [
                (percent(known[split].get("agreement")), decimal(known[split].get("kl_to_teacher"))) for split in SPLITS
            ]
            rows.append((stage.name, cells))
    cka = run.results.get("cka")
    cka = cka if isinstance(cka, dict) else {}
    pictures = [svg for name in _STUDENTS if (svg := _picture(cka, name))]
    notes = _notes(cka)
    if not rows and not pictures and not notes:
        return None
    images = number(cka.get("images"))
    return {
        "splits": SPLITS,
        "rows": rows,
        "pictures": pictures,
        "notes": notes,
        "images": "" if images is None else count(images),
        "split": str(cka.get("split") or ""),
    }


def _picture(cka: dict[str, Any], name: str) -> str | None:
    """CKA of a student's stages with the teacher's; None where it was not measured."""
    layers, values = cka.get("layers") or {}, (cka.get("values") or {}).get(name)
    down, across = layers.get("teacher"), layers.get(name)
    if not values or not down or not across or [len(row) for row in values] != [len(across)] * len(down):
        return None
    fields = [[number(value) for value in row] for row in values]
    best = [max((value for value in row if value is not None), default=None) for row in fields]
    told = ", ".join(f"{decimal(value, 2)} for the teacher's {path}" for path, value in zip(down, best, strict=True))
    return as_svg(
        lambda figure: draw_similarity(figure, fields, down, across, f"Teacher (down) and {name} (across)"),
        similarity_size(len(down), len(across)),
        name=f"cka-{name}",
        label=f"CKA between the stages of teacher and {name}; the highest with any stage of {name}: {told}.",
    )


def _notes(cka: dict[str, Any]) -> list[str]:
    found = []
    if cka.get("failed"):
        found.append(f"How alike the stages of teacher and student are could not be measured: {cka['failed']}.")
    for name, paths in (cka.get("left_out") or {}).items():
        found.append(f"Left out, because its maps are too large to compare: {name}, {', '.join(map(str, paths))}.")
    return found
