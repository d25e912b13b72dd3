"""Confusion matrices: rows are true classes, columns predictions; blue is right, orange is wrong.

PNG files are drawn by matplotlib; the page's SVG is written here, which takes a hundredth of the time.
"""

import base64
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from potstill.report.display_names import display_width, shorten
from potstill.report.theme import CSS_COLORS, GRID, RIGHT, WRONG, text_color_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Matrix = np.ndarray[Any, Any]
CellText = tuple[int, int, str, str]  # row, column, text, colour
CellContent = Literal["counts", "shares", "both"]

_MAX_ANNOTATED = 20  # classes up to which cells show their number
_CSS_VARIABLES = {light: f"var(--{name})" for name, (light, _) in CSS_COLORS.items()}
_MAX_LABELLED = 40  # tick labels; with more classes, every second, fifth, ... has one


def draw_pair(figure: "Figure", matrix: Matrix, class_names: Sequence[str], title: str, *, legend: str = "") -> None:
    """Draw counts on the left, shares of the true class on the right; ``legend`` explains the class names."""
    left, right = figure.subplots(1, 2)
    draw_matrix(left, matrix, class_names, "counts", f"{title}: images")
    draw_matrix(right, matrix, class_names, "shares", f"{title}: share of row")
    if legend:
        for axes in (left, right):
            axes.set_xlabel(f"{axes.get_xlabel()} {legend}")


def matrix_svg(matrix: Matrix, class_names: Sequence[str], title: str, label: str) -> str:
    """Return a matrix for the page, coloured by the share of the true class, with counts in the cells."""
    counts, shares, strength = _normalized_counts(matrix, "both")
    return _svg(_cell_colors(strength), _cell_texts(counts, shares, strength, "both"), class_names, title, label)


def difference_svg(before: Matrix, after: Matrix, class_names: Sequence[str], title: str, label: str) -> str:
    """Return the difference ``after - before``: blue if good (more on the diagonal, less off it), orange if bad."""
    change = after.astype(np.int64) - before
    strength = np.sqrt(np.abs(change) / max(np.abs(change).max(initial=0), 1))
    good = np.where(np.eye(len(change), dtype=bool), change > 0, change < 0)
    texts = (
        (
            row,
            column,
            f"{change[row, column]:+,d}".replace("-", "\N{MINUS SIGN}"),
            text_color_on(RIGHT if good[row, column] else WRONG, float(strength[row, column]), raster=True),
        )
        for row, column in np.argwhere(change).tolist()
    )
    return _svg(_paint_cells(strength, good), texts, class_names, title, label)


def _svg(fields: Any, texts: Iterator[CellText], class_names: Sequence[str], title: str, label: str) -> str:
    """Return the SVG; cells are an image of one pixel each that the browser scales, lengths are in points."""
    from PIL import Image

    classes = len(class_names)
    positions, names, size = _tick_names(class_names, longest=18 if classes <= _MAX_ANNOTATED else 14)
    widest = 0.6 * size * max(map(display_width, names))
    level = classes <= 12 and max(map(display_width, names)) * classes <= 36
    total = 72 * (4.4 if classes <= 10 else 5.0)  # narrow enough that letters keep their size on a phone
    left, top, below = 18 + widest, 22.0, 18 + (1.3 * size if level else widest + 4)
    side = max(total - left - 4, 0.3 * total)
    step = side / classes
    file = io.BytesIO()
    Image.fromarray(np.rint(255 * fields).astype(np.uint8)).save(file, "PNG", compress_level=6)
    picture = base64.b64encode(file.getvalue()).decode()
    centre, middle = left + side / 2, top + side / 2
    every = f" (one class in {positions[1]} is named)" if len(positions) > 1 and positions[1] > 1 else ""
    faint, grid = (
        "fill: var(--faint)",
        f"stroke: var(--grid); stroke-width: {0.6 if classes <= _MAX_ANNOTATED else 0.8}",
    )
    parts = [
        f'<svg viewBox="0 0 {left + side + 4:.5g} {top + side + below:.5g}" role="img" aria-label="{_escaped(label)}">',
        f'<text x="{left:.4g}" y="13" style="font-size: 10px; font-weight: 700">{_escaped(title)}</text>',
        f'<image x="{left:.4g}" y="{top:.4g}" width="{side:.5g}" height="{side:.5g}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{picture}"/>',
    ]
    lines = range(classes + 1) if classes <= _MAX_ANNOTATED else (0, classes)
    for at in (step * line for line in lines):
        parts.append(
            f'<path d="M{left + at:.5g} {top:.5g}v{side:.5g}M{left:.5g} {top + at:.5g}h{side:.5g}" style="{grid}"/>'
        )
    for at, name in zip(positions, names, strict=True):
        along, text = (at + 0.5) * step, _escaped(name)
        style = f"font-size: {size}px; {faint}"
        y = top + along + 0.35 * size
        parts.append(f'<text x="{left - 3:.5g}" y="{y:.5g}" text-anchor="end" style="{style}">{text}</text>')
        x, y = left + along, top + side + 3
        turned = (
            f'x="{x:.5g}" y="{y + size:.5g}" text-anchor="middle"'
            if level
            else f'transform="translate({x + 0.35 * size:.5g} {y:.5g}) rotate(-90)" text-anchor="end"'
        )
        parts.append(f'<text {turned} style="{style}">{text}</text>')
    parts.append(
        f'<text x="{centre:.5g}" y="{top + side + below - 4:.5g}" text-anchor="middle" style="font-size: 9px; {faint}">'
        f"predicted{every}</text>"
        f'<text transform="translate(10 {middle:.5g}) rotate(-90)" text-anchor="middle" '
        f'style="font-size: 9px; {faint}">'
        "true</text>"
    )
    for row, column, text, colour in texts if classes <= _MAX_ANNOTATED else ():
        written = text.split("\n")
        big = _fit_font_size(text, _cell_size(classes), classes)
        y = top + (row + 0.5) * step + big * (0.35 - 0.6 * (len(written) - 1))
        for line in written:
            parts.append(
                f'<text x="{left + (column + 0.5) * step:.5g}" y="{y:.5g}" text-anchor="middle" '
                f'style="font-size: {big:.3g}px; fill: {_CSS_VARIABLES[colour]}">{line}</text>'
            )
            y += 1.2 * big
    return "".join(parts) + "</svg>"


def _escaped(text: str) -> str:
    return escape(text, quote=True)


def pair_figure_size(classes: int) -> tuple[float, float]:
    """Return the figure size in inches for ``draw_pair``."""
    side = _side_inches(classes)
    return 2 * side + 0.6, side + 0.1


def draw_matrix(axes: "Axes", matrix: Matrix, class_names: Sequence[str], shown: CellContent, title: str) -> None:
    """Draw a matrix coloured by the square root of the share, so that a confusion of 1 % is visible."""
    counts, shares, strength = _normalized_counts(matrix, shown)
    classes = len(counts)
    axes.imshow(_cell_colors(strength), interpolation="none", aspect="equal")
    _frame(axes, class_names, title)
    if classes <= _MAX_ANNOTATED:
        for row, column, text, colour in _cell_texts(counts, shares, strength, shown):
            size = _fit_font_size(text, _cell_size(classes), classes)
            axes.text(column, row, text, color=colour, fontsize=size, ha="center", va="center")


def _normalized_counts(matrix: Matrix, shown: CellContent) -> tuple[Any, Any, Any]:
    """Return counts, their shares of the true class, and the opacity of each cell."""
    counts = np.asarray(matrix, dtype=np.float64)
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    return counts, shares, np.sqrt(counts / max(counts.max(), 1.0) if shown == "counts" else shares)


def _frame(axes: "Axes", class_names: Sequence[str], title: str) -> None:
    """Draw title, class names and, for few classes, a grid."""
    classes = len(class_names)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    _set_tick_names(axes, class_names, longest=18 if classes <= _MAX_ANNOTATED else 14)
    if classes <= _MAX_ANNOTATED:
        _grid(axes, classes)


def _cell_colors(strength: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return RGBA [K, K, 4] with the diagonal as right, all else as wrong."""
    return _paint_cells(strength, np.eye(len(strength), dtype=bool))


def _paint_cells(strength: Any, right: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return RGBA [K, K, 4], transparent for empty cells, so that it fits the light and the dark page."""
    from matplotlib.colors import to_rgb

    image = np.empty((*strength.shape, 4))
    image[..., :3] = to_rgb(WRONG)
    image[right, :3] = to_rgb(RIGHT)
    image[..., 3] = strength
    return image


def _set_tick_names(axes: "Axes", class_names: Sequence[str], longest: int) -> None:
    classes = len(class_names)
    positions, names, size = _tick_names(class_names, longest)
    axes.set_yticks(positions, names, fontsize=size)
    if classes <= 12 and max(map(len, names)) * classes <= 36:
        axes.set_xticks(positions, names, fontsize=size)
    else:
        axes.set_xticks(positions, names, fontsize=size, rotation=90, rotation_mode="anchor", ha="right", va="center")
    if len(positions) < classes:
        axes.set_xlabel(f"predicted (one class in {positions[1]} is named)")


def _tick_names(class_names: Sequence[str], longest: int) -> tuple[list[int], list[str], float]:
    """Return positions and names of the labelled classes, and the font size in points."""
    classes = len(class_names)
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    step = next(step for step in steps if math.ceil(classes / step) <= _MAX_LABELLED)
    positions = list(range(0, classes, step))
    size = 9.0 if len(positions) <= 12 else 7.5 if len(positions) <= 25 else 6.0
    return positions, [shorten(class_names[i], longest) or "(empty)" for i in positions], size


def _grid(axes: "Axes", classes: int) -> None:
    lines = np.arange(0.5, classes - 1)
    axes.hlines(lines, -0.5, classes - 0.5, color=GRID, linewidth=0.6)
    axes.vlines(lines, -0.5, classes - 0.5, color=GRID, linewidth=0.6)


def _cell_texts(counts: Any, shares: Any, strength: Any, shown: CellContent) -> Iterator[CellText]:
    classes = len(counts)
    for row, column in np.argwhere(counts).tolist():
        count, share = int(counts[row, column]), float(shares[row, column])
        text = _format_share(share, classes) if shown == "shares" else f"{count:,}"
        if shown == "both" and classes <= 6:
            text += f"\n{_format_share(share, classes)} %"
        elif shown == "shares" and classes <= 6:
            text += " %"
        yield (
            row,
            column,
            text,
            text_color_on(RIGHT if row == column else WRONG, float(strength[row, column]), raster=True),
        )


def _cell_size(classes: int) -> float:
    return 10.0 if classes <= 6 else 8.0 if classes <= 10 else 5.5


def _format_share(share: float, classes: int) -> str:
    value = 100 * share
    if classes <= 6 and 0 < value < 100:
        return f"{value:.1f}"
    return "<1" if 0 < value < 0.5 else f"{value:.0f}"


def _fit_font_size(text: str, size: float, classes: int) -> float:
    """Return a smaller font size for long numbers: at ten classes, about five digits fit in a cell."""
    longest = max(map(len, text.split("\n")))
    room = max(3, round(50 / classes))
    return size if longest <= room else max(4.0, size * room / longest)


def _side_inches(classes: int) -> float:
    return 4.4 if classes <= 4 else 5.0 if classes <= 10 else 6.4 if classes <= 40 else 8.0
