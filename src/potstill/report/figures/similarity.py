"""How alike two networks are, stage by stage."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from potstill.report.figures.legible import text_on
from potstill.report.names import short
from potstill.report.theme import GRID, RIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOM = 3.0  # inches for a square of fields, and what a field takes at least


def similarity_size(rows: int, columns: int) -> tuple[float, float]:
    """Inches for ``draw_similarity``."""
    return max(_ROOM, 0.62 * columns) + 1.0, max(2.2, 0.42 * rows) + 0.9


def draw_similarity(
    figure: "Figure",
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """A field for each pair of stages: its number, and the stronger a blue the more alike they are."""
    from matplotlib.patches import Rectangle

    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.grid(visible=False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            strength = min(1.0, max(0.0, value or 0.0))
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=RIGHT, alpha=strength, linewidth=0))
            text = "–" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(j, i, text, color=text_on(RIGHT, strength), ha="center", va="center")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [short(name, 14) for name in rows])
    across = [short(name, 14) for name in columns]
    axes.set_xticks(range(len(columns)), across)
    if max(map(len, across), default=0) > 7:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
