"""Draw distilled students of several runs beside their baseline, a dot for each seed.

Usage: python scripts/runs_figure.py docs/images/curriculum.png RUN NAME [RUN NAME ...]

Left: top-1 on test.  Right: negative log-likelihood on test.  Dashed: the first run's teacher, or teachers together.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_figures import save

from potstill.report import canvas
from potstill.report.canvas import as_png
from potstill.report.run_reader import Run, read_run


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", help="a run folder, then what it is called in the picture")
    given = parser.parse_args()
    runs = [(read_run(Path(at)), name) for at, name in zip(given.runs[::2], given.runs[1::2], strict=True)]
    save(given.picture, as_png(lambda figure: draw(figure, runs), (8.4, 1.1 + 0.34 * (len(runs) + 1))))


def draw(figure: Any, runs: list[tuple[Run, str]]) -> None:
    """A line of dots for each run, and above them the baseline of the first."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, factor, title in ((left, "top1", 100, "top-1 on test, %"), (right, "nll", 1, "NLL on test, nats")):
        dots(axes, 0, factor * figures(runs[0][0], "baseline", key), canvas.BASELINE)
        for at, (run, _) in enumerate(runs, start=1):
            dots(axes, at, factor * figures(run, "distilled", key), canvas.DISTILLED)
        axes.axvline(factor * of_teachers(runs[0][0], key), color=canvas.TEACHER, linestyle="--", linewidth=1.2)
        axes.set_title(title)
    left.set_yticks(range(len(runs) + 1), ["baseline", *(name for _, name in runs)])
    left.set_ylim(len(runs) + 0.6, -0.6)


def dots(axes: Any, at: int, values: np.ndarray, colour: str) -> None:
    """Each seed, and their mean as a bar."""
    axes.plot(values, np.full(len(values), at), "o", color=colour, markersize=5, alpha=0.75, markeredgewidth=0)
    axes.plot([values.mean()] * 2, [at - 0.3, at + 0.3], color=canvas.INK, linewidth=1.6)


def figures(run: Run, stage: str, key: str) -> np.ndarray:
    """On test, by seed."""
    every = {**run.results["stages"], **(run.results.get("repeats") or {})}
    return np.array([facts["test"][key] for name, facts in every.items() if name.partition("-")[0] == stage])


def of_teachers(run: Run, key: str) -> float:
    """Of the teacher, or of several together."""
    together = (run.results.get("together") or {}).get("teachers")
    return float((together or run.results["stages"]["teacher"])["test"][key])


if __name__ == "__main__":
    main()
