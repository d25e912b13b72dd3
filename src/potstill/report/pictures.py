"""The picture files of a stage."""

from collections.abc import Iterator

from potstill.report.contents import SPLITS, Run, Stage
from potstill.report.figures.canvas import as_png
from potstill.report.figures.confusion import draw_pair, pair_size
from potstill.report.figures.curves import draw_accuracy, draw_loss, draw_top

_CURVE = (6.4, 4.0)  # inches


def pictures(run: Run, stage: Stage) -> Iterator[tuple[str, bytes]]:
    """File name and PNG bytes of each picture for which there are figures."""
    if stage.epochs:
        yield "loss_curve.png", as_png(lambda figure: draw_loss(figure, stage), _CURVE)
        yield "accuracy_curve.png", as_png(lambda figure: draw_accuracy(figure, stage), _CURVE)
        yield "top1_top3.png", as_png(lambda figure: draw_top(figure, stage, run.best_k), _CURVE)
    for split in SPLITS:
        matrix = stage.confusion(split, len(run.class_names))
        if matrix is not None:
            yield f"confusion_matrix_{split}.png", confusion_png(run, stage, split, matrix)


def confusion_png(run: Run, stage: Stage, split: str, matrix: list[list[int]]) -> bytes:
    """Counts and row shares beside each other."""
    title = f"{stage.name}, {split}"
    return as_png(lambda figure: draw_pair(figure, matrix, run.class_names, title), pair_size(len(matrix)))
