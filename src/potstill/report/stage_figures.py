"""Figures of a stage, each drawn once for its PNG file and the page: curves over epochs and confusion matrices.

In confusion matrices rows are true classes, columns predictions; blue is right, orange is wrong.  Their SVG for the
page is written here, which takes a hundredth of matplotlib's time.
"""

import base64
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from potstill.config import stage_number as number_of
from potstill.evaluation import Array
from potstill.formatting import display_width, format_decimal, format_number, format_percent
from potstill.report.canvas import (
    CSS_COLORS,
    FAINT,
    GRID,
    RIGHT,
    ROLE_COLORS,
    SPLIT_COLORS,
    WRONG,
    add_legend_below,
    as_png,
    as_png_and_svg,
    text_color_on,
)
from potstill.report.display_names import escape_invisible, picture_labels, shorten
from potstill.report.run_reader import SPLITS, Run, StageResult

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
        f'<svg viewBox="0 0 {left + side + 4:.5g} {top + side + below:.5g}" role="img" aria-label="{escape(label)}">',
        f'<text x="{left:.4g}" y="13" style="font-size: 10px; font-weight: 700">{escape(title)}</text>',
        f'<image x="{left:.4g}" y="{top:.4g}" width="{side:.5g}" height="{side:.5g}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{picture}"/>',
    ]
    lines = range(classes + 1) if classes <= _MAX_ANNOTATED else (0, classes)
    for at in (step * line for line in lines):
        parts.append(
            f'<path d="M{left + at:.5g} {top:.5g}v{side:.5g}M{left:.5g} {top + at:.5g}h{side:.5g}" style="{grid}"/>'
        )
    for at, name in zip(positions, names, strict=True):
        along, text = (at + 0.5) * step, escape(name)
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


def pair_figure_size(classes: int) -> tuple[float, float]:
    """Return the figure size in inches for ``draw_pair``."""
    side = 4.4 if classes <= 4 else 5.0 if classes <= 10 else 6.4 if classes <= 40 else 8.0
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


def _cell_colors(strength: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return RGBA [K, K, 4], transparent for empty cells, so that it fits the light and the dark page."""
    from matplotlib.colors import to_rgb

    image = np.empty((*strength.shape, 4))
    image[..., :3] = to_rgb(WRONG)
    image[np.eye(len(strength), dtype=bool), :3] = to_rgb(RIGHT)
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


_DASHES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (4, 1.6)), (0, (6, 1.5, 1, 1.5)), (0, (2, 2)))
_MAX_MARKED = 15  # epochs up to which each has a marker


def draw_loss(figure: "Figure", stage: StageResult) -> None:
    """Draw the loss on train and val, and its terms (dashed) if there are several."""
    axes = _make_axes(figure, stage, "Loss", "loss")
    shown = [split for split in ("train", "val") if _plot_metric(axes, stage, split, "loss", label=split)]
    dashes = dict(zip(sorted({term for split in shown for term in _terms(stage, split)}), cycle(_DASHES), strict=False))
    for split in shown:
        terms = _terms(stage, split)
        for term in terms if len(terms) > 1 else []:  # a single term is the loss itself
            values = _values(stage, split, "terms", term)
            _plot_line(
                axes, stage, values, f"{split}: {escape_invisible(term)}", SPLIT_COLORS[split], dashes[term], 1.2
            )
    known = [v for line in axes.get_lines() for v in map(float, line.get_ydata()) if math.isfinite(v)]  # type: ignore[arg-type]
    positive = [value for value in known if value > 0]
    if min(known, default=0.0) < 0:  # such as VID's term, a logarithm of variances: neither cut off nor logarithmic
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    elif positive and max(positive) > 50 * min(positive):
        _log_axis(axes)
    else:
        axes.set_ylim(bottom=0)
    _finish_axes(figure, axes, stage)


def draw_accuracy(figure: "Figure", stage: StageResult) -> None:
    """Draw top-1 on train and val (and test if evaluated each epoch), and the final test result as a marker."""
    axes = _make_axes(figure, stage, "Top-1 accuracy", "top-1")
    curves = [split for split in SPLITS if _plot_metric(axes, stage, split, "top1", label=split)]
    final = format_number(stage.metrics.get("test", {}).get("top1"))
    if final is not None and stage.best_epoch is not None and "test" not in curves:
        mark = {"marker": "D", "markersize": 6, "linestyle": "none", "color": SPLIT_COLORS["test"], "clip_on": False}
        axes.plot([stage.best_epoch], [final], label=f"test (final): {100 * final:.1f} %", zorder=4, **mark)  # type: ignore[arg-type]
    _percent_axis(axes)
    _finish_axes(figure, axes, stage)


def draw_top(figure: "Figure", stage: StageResult, k: int = 3) -> None:
    """Draw top-1 (solid) and top-k (dashed) on train and val."""
    axes = _make_axes(figure, stage, f"Top-1 against top-{k}", "share of images")
    for split in ("train", "val"):
        _plot_metric(axes, stage, split, "top1", label=f"{split}: top-1")
        _plot_metric(axes, stage, split, "top3", label=f"{split}: top-{k}", dashes=_DASHES[1])
    _percent_axis(axes)
    _finish_axes(figure, axes, stage)


def draw_stages(figure: "Figure", run: Run) -> None:
    """Draw top-1 on val of every stage; stages of one role share a colour, not a line style."""
    axes: Axes = figure.subplots()
    axes.set_title("Top-1 on val, stage by stage")
    axes.set_ylabel("top-1")
    for name, stage in run.stages.items():
        colour = ROLE_COLORS[stage.role]
        plain_line = "--" if stage.role == "teacher" else "-"
        style = plain_line if number_of(name) == 1 else _DASHES[number_of(name) % len(_DASHES)]
        if _plot_metric(axes, stage, "val", "top1", label=name, dashes=style, colour=colour):
            epochs, values = _epochs(stage), _values(stage, "val", "top1")
            best = [(e, v) for e, v in zip(epochs, values, strict=True) if e == stage.best_epoch]
            for epoch, value in best:
                axes.plot([epoch], [value], "o", color=colour, markersize=7, zorder=4, clip_on=False)
    _percent_axis(axes)
    _epoch_axis(axes, [epoch for stage in run.stages.values() for epoch in _epochs(stage)])
    axes.set_xlabel("epoch (the dot is the best one)")
    add_legend_below(figure, axes)


def _make_axes(figure: "Figure", stage: StageResult, title: str, unit: str) -> "Axes":
    axes: Axes = figure.subplots()
    axes.set_title(f"{title}: {stage.name}")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    return axes


def _epochs(stage: StageResult) -> list[int]:
    return [record["epoch"] for record in stage.epochs]


def _terms(stage: StageResult, split: str) -> list[str]:
    return sorted({term for record in stage.epochs for term in (record.get(split) or {}).get("terms") or {}})


def _values(stage: StageResult, *keys: str) -> list[float]:
    """Return a value for each epoch; NaN, a gap in the line, if it is missing."""
    values = []
    for record in stage.epochs:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        number = format_number(value)
        values.append(math.nan if number is None else number)
    return values


def _plot_metric(
    axes: "Axes", stage: StageResult, split: str, key: str, *, label: str, dashes: Any = "-", colour: str | None = None
) -> bool:
    """Draw one line; return False if there is nothing to draw."""
    values = _values(stage, split, key)
    if all(map(math.isnan, values)):
        return False
    _plot_line(axes, stage, values, label, colour or SPLIT_COLORS[split], dashes, 1.8)
    return True


def _plot_line(
    axes: "Axes", stage: StageResult, values: list[float], label: str, colour: str, dashes: Any, width: float
) -> None:
    marker = "o" if len(values) <= _MAX_MARKED else None
    size = 6 if len(values) == 1 else 3
    style = {"color": colour, "linestyle": dashes, "linewidth": width, "marker": marker, "markersize": size}
    # A marker at 0 or 100 % is drawn whole, beyond the edge of the axes and over their line (zorder 2.5).
    axes.plot(_epochs(stage), values, label=label, clip_on=False, zorder=3, **style)


def _percent_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = axes.get_ylim()
    # At least five points of height, so that noise of tenths looks small.
    low, high = min(low, high - 0.05), max(high, low + 0.05)
    axes.set_ylim(max(low, -0.01), min(high, 1.01))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _log_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{axes.get_ylabel()} (log scale)")


def _finish_axes(figure: "Figure", axes: "Axes", stage: StageResult) -> None:
    if stage.best_epoch is not None:
        axes.axvline(stage.best_epoch, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set_xlabel(f"epoch (dashed: the best on val, {stage.best_epoch})")
    _epoch_axis(axes, _epochs(stage))
    add_legend_below(figure, axes)


def _epoch_axis(axes: "Axes", epochs: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    first, last = min(epochs, default=1), max(epochs, default=1)
    room = max(0.5, 0.03 * (last - first))
    axes.set_xlim(first - room, last + room)


_CURVE_SIZE = (4.4, 3.3)  # inches
_CURVE_DPI = 210  # of the curves' files: 924 x 693


def stage_pictures(run: Run, stage: StageResult) -> Iterator[tuple[str, bytes]]:
    """Yield file name and PNG bytes of each figure that has data."""
    if stage.epochs:
        for name, (png, _) in stage_curves(run, stage).items():
            yield f"{name}.png", png
    for split in SPLITS:
        matrix = stage.confusion(split, len(run.class_names))
        if matrix is not None:
            yield f"confusion_matrix_{split}.png", _confusion_png(run, stage, split, matrix)


def stage_curves(run: Run, stage: StageResult) -> dict[str, tuple[bytes, str]]:
    """Return PNG and SVG of each curve over epochs that has data, by name; drawn at the first call."""
    drawn = stage.parsed_files.get("curves")
    if drawn is None:
        drawn = stage.parsed_files["curves"] = {
            name: _draw_curve(run, stage, name)
            for name, (_, key, _) in _CURVE_KINDS.items()
            if any(endpoints(stage, split, key) for split in SPLITS)
        }
    found: dict[str, tuple[bytes, str]] = drawn
    return found


def endpoints(stage: StageResult, split: str, key: str, what: str = "") -> str:
    """Describe a metric in the first and the last epoch, for screen readers; "" if it is missing."""
    values = [format_number((record.get(split) or {}).get(key)) for record in stage.epochs]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    form = format_decimal if key == "loss" else format_percent
    name = f"{stage.name}, {split}" + (f", {what}" if what else "")
    return f"{name}: {form(known[0])} in the first epoch, {form(known[-1])} in the last."


def _draw_curve(run: Run, stage: StageResult, name: str) -> tuple[bytes, str]:
    draw, key, what = _CURVE_KINDS[name]
    k = run.best_k
    label = f"Line chart: {what.format(k=k)} of {stage.name} over epochs. "
    label += f"{endpoints(stage, 'train', key)} {endpoints(stage, 'val', key)}"
    if name == "top1_top3":
        label += f" {endpoints(stage, 'val', 'top3', f'top-{k}')}"
    return as_png_and_svg(
        lambda figure: draw(figure, stage, k), _CURVE_SIZE, name=f"{name}-{stage.name}", label=label, dpi=_CURVE_DPI
    )


_CURVE_KINDS: dict[str, tuple[Callable[["Figure", StageResult, int], None], str, str]] = {
    "loss_curve": (lambda figure, stage, _: draw_loss(figure, stage), "loss", "loss"),
    "accuracy_curve": (lambda figure, stage, _: draw_accuracy(figure, stage), "top1", "top-1"),
    "top1_top3": (draw_top, "top1", "top-1 against top-{k}"),
}


def _confusion_png(run: Run, stage: StageResult, split: str, matrix: Array) -> bytes:
    title, shown = f"{stage.name}, {split}", picture_labels(run.class_names)

    def draw(figure: "Figure") -> None:
        draw_pair(figure, matrix, shown.names, title, legend=shown.legend)

    return as_png(draw, pair_figure_size(len(matrix)), families=shown.families)
