"""Draw docs/images/sweep.png from the folder of a finished sweep: what mattered, and each key against val.

Usage: python scripts/sweep_figure.py RUN
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_figures import DOCS, save

from potstill.io import read_checksummed_json
from potstill.report.canvas import as_png
from potstill.report.sweep import draw_importance, draw_slice


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished sweep")
    folder = parser.parse_args().run
    sweep, trials, final = (read_checksummed_json(folder / f"{name}.json") for name in ("sweep", "trials", "final"))
    keys = sweep["space"]

    def draw(figure: Any) -> None:
        parts = figure.subfigures(1, 1 + len(keys))
        draw_importance(parts[0], trials["importance"])
        for part, key in zip(parts[1:], keys, strict=True):
            draw_slice(part, trials["trials"], key, final["trial"])

    save(DOCS / "images" / "sweep.png", as_png(draw, (3.4 * (1 + len(keys)), 2.7)))


if __name__ == "__main__":
    main()
