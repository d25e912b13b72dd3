"""Curves over epochs: loss and its terms, top-1, top-1 against top-3, and the stages beside each other."""

import math
from itertools import cycle
from typing import TYPE_CHECKING, Any

from potstill.amounts import number
from potstill.experiments.stage_names import number as number_of
from potstill.report.contents import SPLITS, Run, Stage
from potstill.report.names import plain
from potstill.report.theme import FAINT, ROLE_COLOURS, SPLIT_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (4, 1.6)), (0, (6, 1.5, 1, 1.5)), (0, (2, 2)))
_MARKED = 15  # epochs up to which each one gets a dot


def draw_loss(figure: "Figure", stage: Stage) -> None:
    """Loss on train and val; its terms dashed where there are several."""
    axes = _axes(figure, stage, "Loss", "loss")
    shown = [split for split in ("train", "val") if _line(axes, stage, split, "loss", label=split)]
    dashes = dict(zip(sorted({term for split in shown for term in _terms(stage, split)}), cycle(_DASHES), strict=False))
    for split in shown:
        terms = _terms(stage, split)
        for term in terms if len(terms) > 1 else []:  # a single term is the loss itself
            values = _values(stage, split, "terms", term)
            _plot(axes, stage, values, f"{split}: {plain(term)}", SPLIT_COLOURS[split], dashes[term], 1.2)
    positive = [v for line in axes.get_lines() for v in map(float, line.get_ydata()) if v > 0]  # type: ignore[arg-type]
    if positive and max(positive) > 50 * min(positive):
        _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
    _finish(figure, axes, stage)


def draw_accuracy(figure: "Figure", stage: Stage) -> None:
    """Top-1 on train and val (test where it was asked for), and the final test result as one mark."""
    axes = _axes(figure, stage, "Top-1 accuracy", "top-1")
    curves = [split for split in SPLITS if _line(axes, stage, split, "top1", label=split)]
    final = number(stage.metrics.get("test", {}).get("top1"))
    if final is not None and stage.best_epoch is not None and "test" not in curves:
        mark = {"marker": "D", "markersize": 6, "linestyle": "none", "color": SPLIT_COLOURS["test"]}
        axes.plot([stage.best_epoch], [final], label=f"test, once: {100 * final:.1f} %", zorder=4, **mark)  # type: ignore[arg-type]
    _percent(axes)
    _finish(figure, axes, stage)


def draw_top(figure: "Figure", stage: Stage, k: int = 3) -> None:
    """Top-1 (solid) against top-k (dashed), on train and val."""
    axes = _axes(figure, stage, f"Top-1 against top-{k}", "share of images")
    for split in ("train", "val"):
        _line(axes, stage, split, "top1", label=f"{split}: top-1")
        _line(axes, stage, split, "top3", label=f"{split}: top-{k}", dashes=_DASHES[1])
    _percent(axes)
    _finish(figure, axes, stage)


def draw_rate(figure: "Figure", stage: Stage) -> None:
    """The learning rate at the end of each epoch; logarithmic where it falls by more than a factor of 50."""
    axes = _axes(figure, stage, "Learning rate", "learning rate")
    values = _values(stage, "lr")
    _plot(axes, stage, values, "learning rate", FAINT, "-", 1.8)
    known = [value for value in values if value > 0]
    if known and max(known) > 50 * min(known):
        _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
    _whole_epochs(axes, _epochs(stage))


def draw_stages(figure: "Figure", run: Run) -> None:
    """Top-1 on val of every stage, each over its own epochs; stages of one role share a colour, not a dash."""
    axes: Axes = figure.subplots()
    axes.set_title("Top-1 on val, stage by stage")
    axes.set_ylabel("top-1")
    for name, stage in run.stages.items():
        colour = ROLE_COLOURS[stage.role]
        plain_line = "--" if stage.role == "teacher" else "-"
        style = plain_line if number_of(name) == 1 else _DASHES[number_of(name) % len(_DASHES)]
        if _line(axes, stage, "val", "top1", label=name, dashes=style, colour=colour):
            epochs, values = _epochs(stage), _values(stage, "val", "top1")
            best = [(e, v) for e, v in zip(epochs, values, strict=True) if e == stage.best_epoch]
            for epoch, value in best:
                axes.plot([epoch], [value], "o", color=colour, markersize=7, zorder=4)
    _percent(axes)
    _whole_epochs(axes, [epoch for stage in run.stages.values() for epoch in _epochs(stage)])
    axes.set_xlabel("epoch (the dot is the best one)")
    _legend(figure, axes)


def _axes(figure: "Figure", stage: Stage, title: str, unit: str) -> "Axes":
    axes: Axes = figure.subplots()
    axes.set_title(f"{title}: {stage.name}")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    return axes


def _epochs(stage: Stage) -> list[int]:
    return [record["epoch"] for record in stage.epochs]


def _terms(stage: Stage, split: str) -> list[str]:
    return sorted({term for record in stage.epochs for term in (record.get(split) or {}).get("terms") or {}})


def _values(stage: Stage, *keys: str) -> list[float]:
    """One value for each epoch; NaN, which is a gap in the line, where there is none."""
    values = []
    for record in stage.epochs:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found = number(value)
        values.append(math.nan if found is None else found)
    return values


def _line(
    axes: "Axes", stage: Stage, split: str, key: str, *, label: str, dashes: Any = "-", colour: str | None = None
) -> bool:
    """Draw one line; False where there is nothing to draw."""
    values = _values(stage, split, key)
    if all(map(math.isnan, values)):
        return False
    _plot(axes, stage, values, label, colour or SPLIT_COLOURS[split], dashes, 1.8)
    return True


def _plot(axes: "Axes", stage: Stage, values: list[float], label: str, colour: str, dashes: Any, width: float) -> None:
    marker = "o" if len(values) <= _MARKED else None
    size = 6 if len(values) == 1 else 3
    style = {"color": colour, "linestyle": dashes, "linewidth": width, "marker": marker, "markersize": size}
    axes.plot(_epochs(stage), values, label=label, **style)


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = axes.get_ylim()
    # At least five points of height: noise of tenths must not look like a mountain.
    low, high = min(low, high - 0.05), max(high, low + 0.05)
    axes.set_ylim(max(low, -0.01), min(high, 1.01))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _logarithmic(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{axes.get_ylabel()} (log scale)")


def _finish(figure: "Figure", axes: "Axes", stage: Stage) -> None:
    if stage.best_epoch is not None:
        axes.axvline(stage.best_epoch, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set_xlabel(f"epoch (dashed: the best on val, {stage.best_epoch})")
    _whole_epochs(axes, _epochs(stage))
    _legend(figure, axes)


def _whole_epochs(axes: "Axes", epochs: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    first, last = min(epochs, default=1), max(epochs, default=1)
    room = max(0.5, 0.03 * (last - first))
    axes.set_xlim(first - room, last + room)


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = len(labels) if len(labels) <= 3 else math.ceil(len(labels) / 2) if len(labels) <= 6 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, handlelength=2.4)
