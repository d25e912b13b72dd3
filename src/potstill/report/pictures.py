"""The picture files of a stage, and the same curves for the page: each is drawn once."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from potstill.amounts import decimal, number, percent
from potstill.evaluation.averages import Array
from potstill.report.contents import SPLITS, Run, Stage
from potstill.report.figures.canvas import as_both, as_png
from potstill.report.figures.confusion import draw_pair, pair_size
from potstill.report.figures.curves import draw_accuracy, draw_loss, draw_top
from potstill.report.figures.fonts import labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE = (4.4, 3.3)  # inches
_DPI = 210  # of the curves' files: 924 x 693


def pictures(run: Run, stage: Stage) -> Iterator[tuple[str, bytes]]:
    """File name and PNG bytes of each picture for which there are figures."""
    if stage.epochs:
        for name, (png, _) in curves(run, stage).items():
            yield f"{name}.png", png
    for split in SPLITS:
        matrix = stage.confusion(split, len(run.class_names))
        if matrix is not None:
            yield f"confusion_matrix_{split}.png", _confusion_png(run, stage, split, matrix)


def curves(run: Run, stage: Stage) -> dict[str, tuple[bytes, str]]:
    """PNG file and SVG of each curve over epochs, by name; drawn on the first call."""
    drawn = stage.read_once.get("curves")
    if drawn is None:
        drawn = stage.read_once["curves"] = {name: _curve(run, stage, name) for name in _CURVES}
    found: dict[str, tuple[bytes, str]] = drawn
    return found


def ends(stage: Stage, split: str, key: str, what: str = "") -> str:
    """A figure in the first epoch and in the last, for those who do not see the picture; "" where there is none."""
    values = [number((record.get(split) or {}).get(key)) for record in stage.epochs]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    form = decimal if key == "loss" else percent
    name = f"{stage.name}, {split}" + (f", {what}" if what else "")
    return f"{name}: {form(known[0])} in the first epoch, {form(known[-1])} in the last."


def _curve(run: Run, stage: Stage, name: str) -> tuple[bytes, str]:
    draw, key, what = _CURVES[name]
    k = run.best_k
    label = f"Line chart: {what.format(k=k)} of {stage.name} over epochs. "
    label += f"{ends(stage, 'train', key)} {ends(stage, 'val', key)}"
    if name == "top1_top3":
        label += f" {ends(stage, 'val', 'top3', f'top-{k}')}"
    return as_both(lambda figure: draw(figure, stage, k), _CURVE, name=f"{name}-{stage.name}", label=label, dpi=_DPI)


_CURVES: dict[str, tuple[Callable[["Figure", Stage, int], None], str, str]] = {
    "loss_curve": (lambda figure, stage, _: draw_loss(figure, stage), "loss", "loss"),
    "accuracy_curve": (lambda figure, stage, _: draw_accuracy(figure, stage), "top1", "top-1"),
    "top1_top3": (draw_top, "top1", "top-1 against top-{k}"),
}


def _confusion_png(run: Run, stage: Stage, split: str, matrix: Array) -> bytes:
    """Counts and row shares beside each other."""
    title, shown = f"{stage.name}, {split}", labels(run.class_names)

    def draw(figure: "Figure") -> None:
        draw_pair(figure, matrix, shown.names, title, legend=shown.legend)

    return as_png(draw, pair_size(len(matrix)), families=shown.families)
