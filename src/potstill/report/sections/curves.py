"""How training went."""

from typing import Any

from potstill.amounts import decimal, number, percent
from potstill.report.contents import Run, Stage
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.curves import draw_accuracy, draw_loss, draw_rate, draw_stages, draw_top

_WIDE, _SMALL = (4.9, 3.0), (4.4, 3.3)  # inches


def context(run: Run) -> dict[str, Any] | None:
    """One picture of all stages, then four of each."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    if not trained:
        return None
    together = None
    if len(trained) > 1:
        label = f"Line chart: top-1 on val over epochs. {' '.join(_ends(stage, 'val', 'top1') for stage in trained)}"
        together = as_svg(lambda figure: draw_stages(figure, run), _WIDE, name="stages", label=label)
    return {"together": together, "stages": [(stage.name, _pictures(run, stage)) for stage in trained]}


def _pictures(run: Run, stage: Stage) -> list[str]:
    k = run.best_k
    pictures = [
        as_svg(
            lambda figure: draw_loss(figure, stage),
            _SMALL,
            name=f"loss-{stage.name}",
            label=_label(stage, "loss", "loss"),
        ),
        as_svg(
            lambda figure: draw_accuracy(figure, stage),
            _SMALL,
            name=f"accuracy-{stage.name}",
            label=_label(stage, "top1", "top-1"),
        ),
        as_svg(
            lambda figure: draw_top(figure, stage, k),
            _SMALL,
            name=f"top-{stage.name}",
            label=f"{_label(stage, 'top1', f'top-1 against top-{k}')} {_ends(stage, 'val', 'top3', f'top-{k}')}",
        ),
    ]
    rates = [rate for record in stage.epochs if (rate := number(record.get("lr"))) is not None]
    if rates:
        label = (
            f"Line chart: learning rate of {stage.name}, {rates[0]:g} in the first epoch, {rates[-1]:g} in the last."
        )
        pictures.append(as_svg(lambda figure: draw_rate(figure, stage), _SMALL, name=f"rate-{stage.name}", label=label))
    return pictures


def _label(stage: Stage, key: str, what: str) -> str:
    return f"Line chart: {what} of {stage.name} over epochs. {_ends(stage, 'train', key)} {_ends(stage, 'val', key)}"


def _ends(stage: Stage, split: str, key: str, what: str = "") -> str:
    values = [number((record.get(split) or {}).get(key)) for record in stage.epochs]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    form = decimal if key == "loss" else percent
    name = f"{stage.name}, {split}" + (f", {what}" if what else "")
    return f"{name}: {form(known[0])} in the first epoch, {form(known[-1])} in the last."
