"""Draw docs/images/domain.png from finished runs between the same two domains.

Usage: python scripts/domain_figure.py RUN NAME [RUN NAME ...]

Above: one test image of every class, of the source and of each target.  Below: top-1 on both tests.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_figures import DOCS, grid_as_png, save

from potstill.config.recipe import load_recipe
from potstill.data.datasets import load_data
from potstill.data.splits import DataSplits
from potstill.report import canvas
from potstill.report.run_reader import Run, read_run

SHOWN = 10  # classes
BARS = (("teacher", canvas.TEACHER), ("baseline", canvas.BASELINE), ("distilled", canvas.DISTILLED))


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="a run folder, then what it is called in the picture")
    given = parser.parse_args().runs
    runs = [(read_run(Path(folder)), name) for folder, name in zip(given[::2], given[1::2], strict=True)]
    every = [load_data(load_recipe(run.folder / "recipe.yaml").data) for run, _ in runs]
    domains = [every[0], *{data.measured.source: data.measured for data in every}.values()]
    size = (8.4, 2.9 + 0.75 * len(domains))
    save(DOCS / "images" / "domain.png", grid_as_png(lambda figure: draw(figure, runs, domains), size))


def draw(figure: Any, runs: list[tuple[Run, str]], domains: list[DataSplits]) -> None:
    """A row of images for each domain, and beneath them the bars of each run."""
    above, below = figure.subfigures(2, 1, height_ratios=[0.75 * len(domains), 2.9])
    images(above, domains)
    pair = below.subplots(1, 2, sharey=True)
    for axes, key, title in ((pair[0], "test", "top-1 on the target's test"),
                             (pair[1], "source_test", "top-1 on the source's test")):  # fmt: skip
        bars(axes, runs, key)
        axes.set_title(title)
    pair[0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    pair[1].legend(loc="upper right", fontsize=7, ncols=2)


def images(figure: Any, domains: list[DataSplits]) -> None:
    """The first test image of every class in each domain, the source first."""
    grid = figure.subplots(len(domains), min(SHOWN, len(domains[0].class_names)))
    for row, domain in enumerate(domains):
        labels = np.asarray(domain.test.labels)
        for label, axes in enumerate(grid[row]):
            axes.imshow(domain.test.pixels(int(np.flatnonzero(labels == label)[0])), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        grid[row][0].set_ylabel("target" if row else "source")


def bars(axes: Any, runs: list[tuple[Run, str]], key: str) -> None:
    """Teacher, baseline and distilled of each run: mean over the seeds, whose spread is a line."""
    width = 0.2
    for at, (run, _) in enumerate(runs):
        for place, (stage, colour) in enumerate(BARS):
            found = figures(run, stage, key)
            axes.bar(at + (place - 1.5) * width, np.mean(found), width * 0.9, color=colour,
                     label=stage if at == 0 else None)  # fmt: skip
            axes.plot([at + (place - 1.5) * width] * 2, [min(found), max(found)], color=canvas.INK, linewidth=1)
            label(axes, at + (place - 1.5) * width, float(np.mean(found)), max(found))
        alone = (run.comparison or {}).get("domain", {}).get("adapted_baseline_top1")
        if key == "test" and alone is not None:
            axes.bar(at + 1.5 * width, alone, width * 0.9, color=canvas.PAPER, edgecolor=canvas.BASELINE)
            label(axes, at + 1.5 * width, alone, alone)
    axes.bar(0, 0, color=canvas.PAPER, edgecolor=canvas.BASELINE, label="baseline with AdaBN")
    axes.set_xticks(range(len(runs)), [name for _, name in runs])
    axes.set_ylim(0, 1.18)
    axes.grid(visible=False, axis="x")


def figures(run: Run, stage: str, key: str) -> list[float]:
    """Top-1 by seed."""
    every = {**run.results["stages"], **run.results["repeats"]}
    return [facts[key]["top1"] for name, facts in every.items() if name == stage or name.startswith(f"{stage}-")]


def label(axes: Any, x: float, value: float, top: float) -> None:
    """The number above a bar."""
    axes.text(x, top + 0.02, f"{100 * value:.0f}", ha="center", fontsize=6.5, color=canvas.FAINT)


if __name__ == "__main__":
    main()
