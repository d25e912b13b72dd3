"""Reliability diagrams: share right over confidence; on the diagonal a network means what it says."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from potstill.report.theme import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Bins = Sequence[Sequence[float]]  # images, mean confidence, share right


def draw_reliability(figure: "Figure", before: Bins, after: Bins, title: str, colour: str) -> None:
    """As it is (solid) and after temperature scaling (dashed); a dot's size follows its number of images."""
    from matplotlib.ticker import PercentFormatter

    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    _line(axes, before, "as it is", colour, "-")
    _line(axes, after, "scaled", FAINT, "--")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.legend(loc="upper left", fontsize=8.5)


def _line(axes: "Axes", bins: Bins, label: str, colour: str, dashes: Any) -> None:
    images = sum(each[0] for each in bins) or 1
    x, y = [each[1] for each in bins], [each[2] for each in bins]
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.5, label=label)
    axes.scatter(x, y, s=[8 + 90 * each[0] / images for each in bins], color=colour, zorder=3, linewidths=0)
