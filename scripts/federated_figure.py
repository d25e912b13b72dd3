"""Draw docs/images/federated.png from runs of `potstill federated run` that differ in their seed.

Usage: python scripts/federated_figure.py RUN [RUN ...]

Left: top-1 on val after each round, mean over the runs.  Right: top-1 on test, a dot for each run, against all bytes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_figures import DOCS, save

from potstill.contrib.federated import ALGORITHMS
from potstill.contrib.federated.federation import RESULTS_FILE
from potstill.io import read_checksummed_json
from potstill.report import canvas
from potstill.report.canvas import as_png

COLOURS = dict(zip(ALGORITHMS, (canvas.BASELINE, canvas.DISTILLED, canvas.TEACHER), strict=True))


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    found = [read_checksummed_json(run / RESULTS_FILE) for run in parser.parse_args().runs]
    save(DOCS / "images" / "federated.png", as_png(lambda figure: draw(figure, found), (8.4, 3.4)))


def draw(figure: Any, found: list[dict[str, Any]]) -> None:
    """Rounds and traffic."""
    left, right = figure.subplots(1, 2, sharey=True)
    for name in (name for name in ALGORITHMS if name in found[0]["trained"]):
        each = [run["trained"][name] for run in found]
        curves = np.array([[entry["val"]["top1"] for entry in run["rounds"]] for run in each])
        left.plot(range(1, curves.shape[1] + 1), 100 * curves.mean(axis=0), color=COLOURS[name], label=name)
        right.plot([run["bytes"] / 1e6 for run in each], [100 * run["test"]["top1"] for run in each], "o",
                   color=COLOURS[name], markersize=5, markeredgewidth=0)  # fmt: skip
    for name, share in (
        ("central", [run["trained"]["central"]["test"]["top1"] for run in found]),
        ("alone", [run["alone"]["mean"] for run in found]),
    ):
        height = 100 * float(np.mean(share))
        right.axhline(height, color=canvas.FAINT, linestyle=":", linewidth=1.2)
        place = right.get_yaxis_transform()
        right.text(0.02, height + 1, name, fontsize=7, color=canvas.FAINT, transform=place)
    left.set_title("top-1 on val, % (mean)")
    left.set_xlabel("round")
    left.legend(fontsize=7)
    right.set_title("top-1 on test, %")
    right.set_xlabel("MB over the wire, all clients and rounds")
    right.set_xscale("log")
    right.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    left.xaxis.get_major_locator().set_params(integer=True)


if __name__ == "__main__":
    main()
