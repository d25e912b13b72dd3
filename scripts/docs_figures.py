"""Draw the figures of docs/how-distillation-works.md from a finished run, and write which run that was into the page.

Usage: python scripts/docs_figures.py RUN
"""

import argparse
import csv
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from potstill.config.recipe import load_recipe
from potstill.data.datasets import load_data
from potstill.io import write_bytes, write_text
from potstill.report import canvas
from potstill.report.canvas import as_png
from potstill.report.run_reader import Run, read_run
from potstill.report.stage_figures import draw_loss, draw_stages

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "how-distillation-works.md"
TEMPERATURES = (1, 2, 4)


@dataclass
class Example:
    """A test image and what the teacher says of it."""

    name: str
    label: str
    probabilities: np.ndarray  # [K], at T = 1
    pixels: np.ndarray  # uint8 [H, W, 3]


def main() -> None:
    """Write docs/images/*.png and the paragraph about the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    run = read_run(arguments.run)
    examples = find_examples(run)
    images = DOCS / "images"
    save(images / "soft-targets.png", grid_as_png(lambda figure: draw_soft_targets(figure, run, examples), (8.4, 5.2)))
    save(images / "loss-terms.png", as_png(lambda figure: draw_loss(figure, run.stages["distilled"]), (7.2, 3.8)))
    save(images / "top1-curves.png", as_png(lambda figure: draw_stages(figure, run), (7.2, 3.8)))
    fill(PAGE, "run", about(run, examples))
    fill(PAGE, "soft targets", table(run, examples[0]))
    fill(PAGE, "verdict", f"The verdict of the run: *{run.results['comparison']['verdict']}*")


def soften(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(z / T) from softmax(z): probabilities to the power of 1 / T, normalised again."""
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum()


def find_examples(run: Run) -> list[Example]:
    """Of the test images that the teacher gets right: two of the least sure, in different classes, and the surest."""
    with (run.folder / "teacher" / "predictions_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    right = [
        (name, label, np.array(p, dtype=np.float64)) for name, label, prediction, *p in rows if label == prediction
    ]
    right.sort(key=lambda row: row[2].max())
    chosen = [right[0], next(row for row in right if row[1] != right[0][1]), right[-1]]
    data = load_data(load_recipe(run.folder / "recipe.yaml").data)
    place = {name: i for i, name in enumerate(data.test.names)}
    return [Example(name, label, p, data.test.pixels(place[name])) for name, label, p in chosen]


def draw_soft_targets(figure, run: Run, examples: list[Example]) -> None:
    """One row an image: the image, then the teacher's probabilities at each temperature."""
    grid = figure.subplots(len(examples), 1 + len(TEMPERATURES), width_ratios=[0.7, *[1] * len(TEMPERATURES)])
    positions = range(len(run.class_names))
    for row, example in enumerate(examples):
        picture, *bars = grid[row]
        picture.imshow(example.pixels, interpolation="nearest")
        picture.set_title(f"label: {example.label}")
        picture.axis("off")
        for axes, temperature in zip(bars, TEMPERATURES, strict=True):
            values = soften(example.probabilities, temperature)
            is_label = [name == example.label for name in run.class_names]
            axes.bar(positions, values, color=[canvas.RIGHT if each else canvas.WRONG for each in is_label])
            for x, value in zip(positions, values, strict=True):
                if value >= 0.005:
                    axes.text(x, value + 0.02, f"{100 * value:.0f}", ha="center", fontsize=6.5, color=canvas.FAINT)
            axes.set_ylim(0, 1.12)
            axes.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
            axes.set_xticks(positions, run.class_names, fontsize=7)
            axes.grid(visible=False, axis="x")
            if row == 0:
                axes.set_title(f"T = {temperature}")
    figure.supxlabel("blue: the probability of the label; orange: of the other classes", fontsize=8, color=canvas.FAINT)


def grid_as_png(draw: canvas.DrawFunction, size: tuple[float, float]) -> bytes:
    """``as_png`` for axes in several rows, which the report's own layout does not arrange."""
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with canvas._style():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="png", dpi=canvas.DPI)
    return buffer.getvalue()


def save(path: Path, png: bytes) -> None:
    """Write a picture with a palette of 256 colours: a third of the bytes, and no difference to the eye."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())
    sys.stdout.write(f"{path}: {len(buffer.getvalue()):,} bytes\n")


def about(run: Run, examples: list[Example]) -> str:
    """Which run the figures show."""
    facts, method = run.results, run.results["method"]
    options = ", ".join(
        f"{key} {value:g}" if isinstance(value, (int, float)) else f"{key} {json.dumps(value)}"
        for key, value in method.items()
        if key != "name"
    )
    stages = run.stages
    teacher, student = (stages[name].model["architecture"] for name in ("teacher", "distilled"))
    scores = ", ".join(f"{name} {100 * stage.metrics['test']['top1']:.1f} %" for name, stage in stages.items())
    return (
        f"All figures on this page were drawn from one real run of `potstill run {facts['recipe']}`: "
        f"data `{facts['data']['source']}`, teacher `{teacher}`, student `{student}`, "
        f"method `{method['name']}` ({options}), seed {facts['seed']}.\n"
        f"Top-1 on its {facts['comparison']['test_images']:,} test images: {scores}.\n"
        f"The images shown are {', '.join(f'`{example.name}`' for example in examples)} of the test split."
    )


def table(run: Run, example: Example) -> str:
    """The first example's largest probabilities at each temperature, in numbers."""
    largest = np.argsort(-example.probabilities)[:4]
    first, second = (100 * example.probabilities[i] for i in largest[:2])
    sentence = (
        f"The first image shows class {run.class_names[largest[0]]}. The teacher gives that class {first:.0f} %, "
        f"and {second:.0f} % to class {run.class_names[largest[1]]}. In numbers:"
    )
    head = " | ".join(f"class {run.class_names[i]}" for i in largest)
    lines = [sentence, "", f"| T | {head} | all others |", "|---" * (len(largest) + 2) + "|"]
    for temperature in TEMPERATURES:
        values = soften(example.probabilities, temperature)
        cells = [*values[largest], 1 - values[largest].sum()]
        lines.append(f"| {temperature} | " + " | ".join(f"{100 * value:.1f} %" for value in cells) + " |")
    return "\n".join(lines)


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- begin: name -->`` and the next ``<!-- end -->``."""
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    new, count = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", old)
    if count != 1:
        raise SystemExit(f"{page}: expected one block {name!r}, found {count}")
    write_text(page, new)


if __name__ == "__main__":
    main()
