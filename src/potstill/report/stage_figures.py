"""Figures of a stage, each drawn once for its PNG file and the page: curves over epochs and confusion matrices."""

import math
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

from potstill.config import stage_number as number_of
from potstill.evaluation import Array
from potstill.formatting import format_decimal, format_number, format_percent
from potstill.report.canvas import as_png, as_png_and_svg
from potstill.report.confusion_matrix import draw_pair, pair_figure_size
from potstill.report.display_names import escape_invisible, picture_labels
from potstill.report.run_reader import SPLITS, Run, StageResult
from potstill.report.theme import FAINT, ROLE_COLORS, SPLIT_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    positive = [v for line in axes.get_lines() for v in map(float, line.get_ydata()) if v > 0]  # type: ignore[arg-type]
    if positive and max(positive) > 50 * min(positive):
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
        mark = {"marker": "D", "markersize": 6, "linestyle": "none", "color": SPLIT_COLORS["test"]}
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


def draw_rate(figure: "Figure", stage: StageResult) -> None:
    """Draw the learning rate of each epoch; logarithmic if it falls by more than a factor of 50."""
    axes = _make_axes(figure, stage, "Learning rate", "learning rate")
    values = _values(stage, "lr")
    _plot_line(axes, stage, values, "learning rate", FAINT, "-", 1.8)
    known = [value for value in values if value > 0]
    if known and max(known) > 50 * min(known):
        _log_axis(axes)
    else:
        axes.set_ylim(bottom=0)
    _epoch_axis(axes, _epochs(stage))


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
                axes.plot([epoch], [value], "o", color=colour, markersize=7, zorder=4)
    _percent_axis(axes)
    _epoch_axis(axes, [epoch for stage in run.stages.values() for epoch in _epochs(stage)])
    axes.set_xlabel("epoch (the dot is the best one)")
    _add_legend(figure, axes)


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
    axes.plot(_epochs(stage), values, label=label, **style)


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
    _add_legend(figure, axes)


def _epoch_axis(axes: "Axes", epochs: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    first, last = min(epochs, default=1), max(epochs, default=1)
    room = max(0.5, 0.03 * (last - first))
    axes.set_xlim(first - room, last + room)


def _add_legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = len(labels) if len(labels) <= 3 else math.ceil(len(labels) / 2) if len(labels) <= 6 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, handlelength=2.4)


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
    """Return PNG and SVG of each curve over epochs by name; drawn at the first call."""
    drawn = stage.parsed_files.get("curves")
    if drawn is None:
        drawn = stage.parsed_files["curves"] = {name: _draw_curve(run, stage, name) for name in _CURVE_KINDS}
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
    """Draw counts and row shares side by side."""
    title, shown = f"{stage.name}, {split}", picture_labels(run.class_names)

    def draw(figure: "Figure") -> None:
        draw_pair(figure, matrix, shown.names, title, legend=shown.legend)

    return as_png(draw, pair_figure_size(len(matrix)), families=shown.families)
