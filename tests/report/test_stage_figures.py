import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from potstill.report.canvas import VAL, as_png, rgb_channels
from potstill.report.run_reader import StageResult
from potstill.report.stage_figures import draw_accuracy, draw_loss, draw_top

DRAWS = True  # one test counts the pixels of a marker


def stage(epochs: int = 3) -> StageResult:
    records = [
        {
            "epoch": epoch,
            "best": epoch == 2,
            "train": {
                "loss": 3.0 / epoch,
                "terms": {"ce": 1.0 / epoch, "kd": 2.0 / epoch},
                "top1": 0.2 * epoch,
                "top3": 0.3 * epoch,
            },
            "val": {
                "loss": 4.0 / epoch,
                "terms": {"ce": 4.0 / epoch},
                "top1": None if epoch == 1 else 0.1 * epoch,
                "top3": 0.9,
            },
        }
        for epoch in range(1, epochs + 1)
    ]
    return StageResult("distilled", Path("distilled"), {}, records, {"test": {"top1": 0.55}})


def lines(figure: Figure) -> dict[str, list[float]]:
    return {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in figure.axes[0].get_lines()}  # type: ignore[union-attr]


def test_loss_and_its_terms() -> None:
    figure = Figure()
    draw_loss(figure, stage())
    drawn = lines(figure)
    assert drawn["train"] == [3.0, 1.5, 1.0]
    assert drawn["val"] == pytest.approx([4.0, 2.0, 4 / 3])
    assert drawn["train: kd"] == pytest.approx([2.0, 1.0, 2 / 3])
    assert "val: ce" not in drawn  # a single term is the loss itself
    assert "dashed: the best on val, 2" in figure.axes[0].get_xlabel()


def test_accuracy_has_gaps_and_the_test_mark() -> None:
    figure = Figure()
    draw_accuracy(figure, stage())
    drawn = lines(figure)
    assert math.isnan(drawn["val"][0])
    assert drawn["val"][1:] == pytest.approx([0.2, 0.3])
    assert drawn["test (final): 55.0 %"] == [0.55]
    mark = next(line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith("test"))
    assert list(mark.get_xdata()) == [2]  # type: ignore[arg-type]
    assert figure.axes[0].yaxis.get_major_formatter()(0.5, 0) == "50 %"


def test_top1_against_topk() -> None:
    figure = Figure()
    draw_top(figure, stage(), 2)
    assert set(lines(figure)) >= {"train: top-1", "train: top-2", "val: top-1", "val: top-2"}


@pytest.mark.parametrize("epochs", [1, 200])
def test_epochs_are_whole_and_all_in_view(epochs: int) -> None:
    figure = Figure()
    draw_top(figure, stage(epochs))
    low, high = figure.axes[0].get_xlim()
    assert low < 1 <= epochs < high
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks() if low <= tick <= high)


def test_a_wide_loss_gets_a_log_scale() -> None:
    figure = Figure()
    draw_loss(figure, stage(200))
    assert figure.axes[0].get_yscale() == "log"


def test_the_marker_of_a_single_epoch_is_whole_at_the_edges() -> None:
    sizes = []
    for top1 in (0.0, 0.4, 1.0):
        run = StageResult(
            "b", Path("b"), {}, [{"epoch": 1, "val": {"top1": top1}, "train": {"top1": abs(top1 - 1)}}], {}
        )
        picture = as_png(lambda figure, run=run: draw_accuracy(figure, run), (4.4, 3.3), dpi=144)
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) / 255
        plot = pixels[: int(0.83 * len(pixels))]  # above the legend
        sizes.append(int((np.abs(plot - rgb_channels(VAL)).max(axis=2) < 0.02).sum()))
    assert min(sizes) > 0.98 * max(sizes) > 60  # a circle of 6 points, 12 pixels wide


def test_a_negative_loss_is_drawn_whole() -> None:
    """VID's term is a logarithm of variances, which becomes negative."""
    figure = Figure()
    values = [{"epoch": e, "train": {"loss": loss}, "val": {}} for e, loss in ((1, 90.0), (2, 0.5), (3, -7.0))]
    draw_loss(figure, StageResult("distilled", Path("distilled"), {}, values, {}))
    low, high = figure.axes[0].get_ylim()
    assert low < -7.0 < 90.0 < high
    assert figure.axes[0].get_yscale() == "linear"
