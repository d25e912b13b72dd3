"""How training went."""

from typing import Any

from potstill.amounts import number
from potstill.report.contents import Run, Stage
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.curves import draw_rate, draw_stages
from potstill.report.pictures import curves, ends

_WIDE, _SMALL = (4.9, 3.0), (4.4, 3.3)  # inches


def context(run: Run) -> dict[str, Any] | None:
    """One picture of all stages, then four of each."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    if not trained:
        return None
    together = None
    if len(trained) > 1:
        label = f"Line chart: top-1 on val over epochs. {' '.join(ends(stage, 'val', 'top1') for stage in trained)}"
        together = as_svg(lambda figure: draw_stages(figure, run), _WIDE, name="stages", label=label)
    return {"together": together, "stages": [(stage.name, _pictures(run, stage)) for stage in trained]}


def _pictures(run: Run, stage: Stage) -> list[str]:
    pictures = [svg for _, svg in curves(run, stage).values()]
    rates = [rate for record in stage.epochs if (rate := number(record.get("lr"))) is not None]
    if rates:
        label = (
            f"Line chart: learning rate of {stage.name}, {rates[0]:g} in the first epoch, {rates[-1]:g} in the last."
        )
        pictures.append(as_svg(lambda figure: draw_rate(figure, stage), _SMALL, name=f"rate-{stage.name}", label=label))
    return pictures
