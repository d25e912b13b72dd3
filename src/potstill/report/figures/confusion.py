"""Confusion matrices: rows are true classes, columns predictions; blue is right, orange is wrong."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from potstill.report.figures.legible import text_on
from potstill.report.names import short
from potstill.report.theme import GRID, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[int]]
Shown = Literal["counts", "shares", "both"]

_ANNOTATED = 20  # classes up to which each cell says its number
_LABELLED = 40  # tick labels at most; of more classes every second, fifth, ... is named


def draw_pair(figure: "Figure", matrix: Matrix, class_names: Sequence[str], title: str) -> None:
    """Counts on the left, shares of the true class on the right."""
    left, right = figure.subplots(1, 2)
    draw_matrix(left, matrix, class_names, "counts", f"{title}: images")
    draw_matrix(right, matrix, class_names, "shares", f"{title}: share of row")


def draw_single(figure: "Figure", matrix: Matrix, class_names: Sequence[str], title: str) -> None:
    """One matrix, coloured by the share of the true class, with counts in the cells."""
    draw_matrix(figure.subplots(), matrix, class_names, "both", title)


def draw_difference(figure: "Figure", before: Matrix, after: Matrix, class_names: Sequence[str], title: str) -> None:
    """After less before: blue where that is good (more on the diagonal, less beside it), orange where it is bad."""
    axes: Axes = figure.subplots()
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    classes = len(change)
    strength = np.sqrt(np.abs(change) / max(np.abs(change).max(initial=0), 1.0))
    good = np.where(np.eye(classes, dtype=bool), change > 0, change < 0)
    axes.imshow(_painted(strength, good), interpolation="none", aspect="equal")
    _frame(axes, class_names, title)
    if classes <= _ANNOTATED:
        size = 10.0 if classes <= 6 else 8.0 if classes <= 10 else 5.5
        for row, column in np.argwhere(change):
            text = f"{int(change[row, column]):+,d}".replace("-", "\N{MINUS SIGN}")
            colour = text_on(RIGHT if good[row, column] else WRONG, float(strength[row, column]), raster=True)
            axes.text(column, row, text, color=colour, fontsize=_fit(text, size, classes), ha="center", va="center")


def pair_size(classes: int) -> tuple[float, float]:
    """Inches for ``draw_pair``."""
    side = _side(classes)
    return 2 * side + 0.6, side + 0.1


def single_size(classes: int) -> tuple[float, float]:
    """Inches for ``draw_single``: narrow enough that letters keep their size on a phone."""
    side = 4.4 if classes <= 10 else 5.0
    return side, 0.85 * side if classes <= 4 else side + 0.1  # few classes have wide names beside narrow fields


def draw_matrix(axes: "Axes", matrix: Matrix, class_names: Sequence[str], shown: Shown, title: str) -> None:
    """Colour by the square root of the share, so that a confusion of 1 % is visible beside 99 % right."""
    counts = np.asarray(matrix, dtype=np.float64)
    classes = len(counts)
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    strength = np.sqrt(counts / max(counts.max(), 1.0) if shown == "counts" else shares)
    axes.imshow(_colours(strength), interpolation="none", aspect="equal")
    _frame(axes, class_names, title)
    if classes <= _ANNOTATED:
        _annotate(axes, counts, shares, strength, shown)


def _frame(axes: "Axes", class_names: Sequence[str], title: str) -> None:
    """Title, names of the classes, and a grid where there are few."""
    classes = len(class_names)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    _name_ticks(axes, class_names, longest=18 if classes <= _ANNOTATED else 14)
    if classes <= _ANNOTATED:
        _grid(axes, classes)


def _colours(strength: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """RGBA [K, K, 4]: the diagonal is right, all else wrong."""
    return _painted(strength, np.eye(len(strength), dtype=bool))


def _painted(strength: Any, right: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """RGBA [K, K, 4]: see-through where nothing is, so that it fits light and dark paper."""
    from matplotlib.colors import to_rgb

    image = np.empty((*strength.shape, 4))
    image[..., :3] = to_rgb(WRONG)
    image[right, :3] = to_rgb(RIGHT)
    image[..., 3] = strength
    return image


def _name_ticks(axes: "Axes", class_names: Sequence[str], longest: int) -> None:
    classes = len(class_names)
    step = next(step for step in _steps() if math.ceil(classes / step) <= _LABELLED)
    places = list(range(0, classes, step))
    names = [short(class_names[i], longest) or "(empty)" for i in places]
    size = 9.0 if len(places) <= 12 else 7.5 if len(places) <= 25 else 6.0
    axes.set_yticks(places, names, fontsize=size)
    if classes <= 12 and max(map(len, names)) * classes <= 36:
        axes.set_xticks(places, names, fontsize=size)
    else:
        axes.set_xticks(places, names, fontsize=size, rotation=90, rotation_mode="anchor", ha="right", va="center")
    if step > 1:
        axes.set_xlabel(f"predicted (one class in {step} is named)")


def _steps() -> Any:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _grid(axes: "Axes", classes: int) -> None:
    lines = np.arange(0.5, classes - 1)
    axes.hlines(lines, -0.5, classes - 0.5, color=GRID, linewidth=0.6)
    axes.vlines(lines, -0.5, classes - 0.5, color=GRID, linewidth=0.6)


def _annotate(axes: "Axes", counts: Any, shares: Any, strength: Any, shown: Shown) -> None:
    classes = len(counts)
    size = 10.0 if classes <= 6 else 8.0 if classes <= 10 else 5.5
    for row, column in np.ndindex(classes, classes):
        count, share = int(counts[row, column]), float(shares[row, column])
        if not count:
            continue
        text = _share(share, classes) if shown == "shares" else f"{count:,}"
        if shown == "both" and classes <= 6:
            text += f"\n{_share(share, classes)} %"
        elif shown == "shares" and classes <= 6:
            text += " %"
        colour = text_on(RIGHT if row == column else WRONG, float(strength[row, column]), raster=True)
        axes.text(column, row, text, color=colour, fontsize=_fit(text, size, classes), ha="center", va="center")


def _share(share: float, classes: int) -> str:
    value = 100 * share
    if classes <= 6 and 0 < value < 100:
        return f"{value:.1f}"
    return "<1" if 0 < value < 0.5 else f"{value:.0f}"


def _fit(text: str, size: float, classes: int) -> float:
    """Smaller type for long numbers: a cell has room for about five digits at ten classes."""
    longest = max(map(len, text.split("\n")))
    room = max(3, round(50 / classes))
    return size if longest <= room else max(4.0, size * room / longest)


def _side(classes: int) -> float:
    return 4.4 if classes <= 4 else 5.0 if classes <= 10 else 6.4 if classes <= 40 else 8.0
