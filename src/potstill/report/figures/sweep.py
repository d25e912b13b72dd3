"""Pictures of a sweep: what mattered, and each key's values against the figure on val."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from potstill.amounts import number
from potstill.report.names import plain
from potstill.report.theme import DISTILLED, FAINT, VAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 12  # values that are still written out below a slice


def draw_importance(figure: "Figure", shares: Mapping[str, float]) -> None:
    """A bar for each key, the largest on top."""
    axes = figure.add_subplot()
    ranked = sorted(shares.items(), key=lambda item: item[1])
    axes.barh([plain(key) for key, _ in ranked], [share for _, share in ranked], color=DISTILLED, height=0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the spread over trials")
    axes.grid(axis="y", visible=False)


def draw_slice(figure: "Figure", trials: Sequence[Mapping[str, Any]], dimension: Mapping[str, Any], best: Any) -> None:
    """One dot a finished trial: its value of one key, and its figure; the winner's is marked."""
    axes = figure.add_subplot()
    key = dimension["key"]
    shown = [trial for trial in trials if trial["value"] is not None and key in trial["chosen"]]
    values = [trial["chosen"][key] for trial in shown]
    if dimension["choices"]:
        places = [float(dimension["choices"].index(value)) for value in values]
        if len(dimension["choices"]) <= _FEW:
            axes.set_xticks(range(len(dimension["choices"])), [plain(text) for text in dimension["choices"]])
        axes.set_xlim(-0.5, len(dimension["choices"]) - 0.5)
    else:
        places = [number(float(value)) or 0.0 for value in values]
        if dimension["log"]:
            axes.set_xscale("log")
        axes.set_xlim(dimension["low"], dimension["high"])
    axes.scatter(places, [trial["value"] for trial in shown], s=26, color=DISTILLED, alpha=0.7, clip_on=False)
    won = [at for at, trial in enumerate(shown) if trial["number"] == best]
    axes.scatter(
        [places[at] for at in won],
        [shown[at]["value"] for at in won],
        s=90,
        facecolors="none",
        edgecolors=VAL,
        clip_on=False,
        zorder=4,
    )
    axes.set_xlabel(plain(key))
    axes.set_ylabel("val", color=FAINT)
