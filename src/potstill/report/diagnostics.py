"""Training curves, fidelity of each student to its teacher, and calibration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from potstill.formatting import format_count, format_decimal, format_number, format_percent
from potstill.report.canvas import as_svg
from potstill.report.display_names import shorten
from potstill.report.run_reader import SPLITS, Run, StageResult
from potstill.report.stage_figures import draw_rate, draw_stages, endpoints, stage_curves
from potstill.report.theme import FAINT, GRID, RIGHT, ROLE_COLORS, text_color_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ReliabilityBins = Sequence[Sequence[float]]  # images, mean confidence, accuracy


def draw_reliability(
    figure: "Figure", before: ReliabilityBins, after: ReliabilityBins, title: str, colour: str
) -> None:
    """Draw a reliability diagram before (solid) and after (dashed) scaling; a dot's area shows its number of images."""
    from matplotlib.ticker import PercentFormatter

    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    _plot_bins(axes, before, "unscaled", colour, "-")
    _plot_bins(axes, after, "scaled", FAINT, "--")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.legend(loc="upper left", fontsize=8.5)


def _plot_bins(axes: "Axes", bins: ReliabilityBins, label: str, colour: str, dashes: Any) -> None:
    images = sum(each[0] for each in bins) or 1
    x, y = [each[1] for each in bins], [each[2] for each in bins]
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.5, label=label)
    axes.scatter(x, y, s=[8 + 90 * each[0] / images for each in bins], color=colour, zorder=3, linewidths=0)


_MIN_SIZE = 3.0  # inches


def similarity_size(rows: int, columns: int) -> tuple[float, float]:
    """Return the figure size in inches for ``draw_similarity``."""
    return max(_MIN_SIZE, 0.62 * columns) + 1.0, max(2.2, 0.42 * rows) + 0.9


def draw_similarity(
    figure: "Figure",
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """Draw a heat map of the similarity of each pair of stages, with its numbers."""
    from matplotlib.patches import Rectangle

    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.grid(visible=False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            strength = min(1.0, max(0.0, value or 0.0))
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=RIGHT, alpha=strength, linewidth=0))
            text = "–" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(j, i, text, color=text_color_on(RIGHT, strength), ha="center", va="center")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [shorten(name, 14) for name in rows])
    across = [shorten(name, 14) for name in columns]
    axes.set_xticks(range(len(columns)), across)
    if max(map(len, across), default=0) > 7:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


_WIDE_SIZE, _SMALL_SIZE = (4.9, 3.0), (4.4, 3.3)  # inches


def curves_context(run: Run) -> dict[str, Any] | None:
    """Return a figure of all stages, and four of each."""
    trained = [stage for stage in run.stages.values() if stage.epochs]
    if not trained:
        return None
    together = None
    if len(trained) > 1:
        label = (
            f"Line chart: top-1 on val over epochs. {' '.join(endpoints(stage, 'val', 'top1') for stage in trained)}"
        )
        together = as_svg(lambda figure: draw_stages(figure, run), _WIDE_SIZE, name="stages", label=label)
    return {"together": together, "stages": [(stage.name, _curve_svgs(run, stage)) for stage in trained]}


def _curve_svgs(run: Run, stage: StageResult) -> list[str]:
    pictures = [svg for _, svg in stage_curves(run, stage).values()]
    rates = [rate for record in stage.epochs if (rate := format_number(record.get("lr"))) is not None]
    if rates:
        label = (
            f"Line chart: learning rate of {stage.name}, {rates[0]:g} in the first epoch, {rates[-1]:g} in the last."
        )
        pictures.append(
            as_svg(lambda figure: draw_rate(figure, stage), _SMALL_SIZE, name=f"rate-{stage.name}", label=label)
        )
    return pictures


_RELIABILITY_SIZE = (4.0, 3.6)  # inches
_LOWEST, _HIGHEST = 0.05, 20.0  # range of the fitted temperature


def calibration_context(run: Run) -> dict[str, Any] | None:
    """Return a reliability diagram and a row for each stage; None if calibration was not measured."""
    found = [(stage, facts) for stage in run.stages.values() if (facts := _calibration_facts(stage))]
    if not found:
        return None
    return {
        "pictures": [_reliability_svg(stage, facts) for stage, facts in found],
        "rows": [(stage.name, _calibration_cells(facts)) for stage, facts in found],
        "notes": [note for stage, facts in found if (note := _temperature_note(stage.name, facts))],
    }


def _temperature_note(name: str, facts: dict[str, Any]) -> str | None:
    """Return a note if the network has the temperature in its logits, or if it is at an end of its range, where the
    scaled metrics mean little.
    """
    temperature = facts["temperature"]
    if facts.get("applied"):
        return f"The last layer of {name} is divided by this temperature, so its predictions and exports are scaled."
    if temperature <= 1.01 * _LOWEST:
        return (
            f"{name} makes no mistake on val, so its fitted temperature is the minimum, {_LOWEST}. Do not scale it: "
            "on test, where it makes mistakes, it would be far too confident."
        )
    if temperature >= 0.99 * _HIGHEST:
        return f"{name} is no better than chance on val: its fitted temperature is the maximum, {_HIGHEST:g}."
    return None


def _calibration_facts(stage: StageResult) -> dict[str, Any] | None:
    """Return ``calibration`` of results.json if it is valid."""
    facts = stage.facts.get("calibration")
    if not isinstance(facts, dict) or format_number(facts.get("temperature")) is None:
        return None
    both = [facts.get(key) for key in ("before", "after")]
    return facts if all(isinstance(each, dict) and _valid_bins(each.get("bins")) for each in both) else None


def _valid_bins(bins: Any) -> bool:
    return isinstance(bins, list) and all(
        isinstance(each, list) and len(each) == 3 and all(format_number(value) is not None for value in each)
        for each in bins
    )


def _calibration_cells(facts: dict[str, Any]) -> list[str]:
    before, after = facts["before"], facts["after"]
    figures = [
        form(each.get(key))
        for key, form in (("ece", format_percent), ("nll", format_decimal))
        for each in (before, after)
    ]
    return [format_decimal(facts["temperature"], 2), *figures]


def _reliability_svg(stage: StageResult, facts: dict[str, Any]) -> str:
    before, after = facts["before"], facts["after"]
    label = (
        f"Reliability diagram of {stage.name} on test: ECE {format_percent(before.get('ece'))} unscaled, "
        f"{format_percent(after.get('ece'))} after temperature scaling."
    )
    return as_svg(
        lambda figure: draw_reliability(
            figure, before["bins"], after["bins"], f"Reliability: {stage.name}", ROLE_COLORS[stage.role]
        ),
        _RELIABILITY_SIZE,
        name=f"reliability-{stage.name}",
        label=label,
    )


_STUDENTS = ("baseline", "distilled")


def fidelity_context(run: Run) -> dict[str, Any] | None:
    """Return agreement and KL divergence of each student on each split, and CKA; None if nothing was measured."""
    rows = []
    for stage in run.stages.values():
        known = {split: stage.metrics.get(split, {}) for split in SPLITS}
        if any(format_number(figures.get("agreement")) is not None for figures in known.values()):
            cells = [
                (format_percent(known[split].get("agreement")), format_decimal(known[split].get("kl_to_teacher")))
                for split in SPLITS
            ]
            rows.append((stage.name, cells))
    cka = run.results.get("cka")
    cka = cka if isinstance(cka, dict) else {}
    pictures = [svg for name in _STUDENTS if (svg := _cka_svg(cka, name))]
    notes = _cka_notes(cka)
    if not rows and not pictures and not notes:
        return None
    images = format_number(cka.get("images"))
    return {
        "splits": SPLITS,
        "rows": rows,
        "pictures": pictures,
        "notes": notes,
        "images": "" if images is None else format_count(images),
        "split": str(cka.get("split") or ""),
    }


def _cka_svg(cka: dict[str, Any], name: str) -> str | None:
    """Return the heat map of CKA between a student's and the teacher's stages; None if it was not measured."""
    layers, values = cka.get("layers") or {}, (cka.get("values") or {}).get(name)
    down, across = layers.get("teacher"), layers.get(name)
    if not values or not down or not across or [len(row) for row in values] != [len(across)] * len(down):
        return None
    fields = [[format_number(value) for value in row] for row in values]
    best = [max((value for value in row if value is not None), default=None) for row in fields]
    highest = ", ".join(
        f"{format_decimal(value, 2)} for the teacher's {path}" for path, value in zip(down, best, strict=True)
    )
    return as_svg(
        lambda figure: draw_similarity(figure, fields, down, across, f"Teacher (down) and {name} (across)"),
        similarity_size(len(down), len(across)),
        name=f"cka-{name}",
        label=f"CKA between the stages of teacher and {name}; the highest with any stage of {name}: {highest}.",
    )


def _cka_notes(cka: dict[str, Any]) -> list[str]:
    found = []
    if cka.get("failed"):
        found.append(f"The similarity of teacher and student stages could not be measured: {cka['failed']}.")
    for name, paths in (cka.get("left_out") or {}).items():
        found.append(f"Left out, as its feature maps are too large to compare: {name}, {', '.join(map(str, paths))}.")
    return found
