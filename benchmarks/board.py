"""Methods and baselines, by data set, budget and seed: the tables of docs/board.md.

    python benchmarks/board.py --images clothing=DIR --images cifar10=DIR --teacher cifar10=FILE
    python benchmarks/board.py --data quickstart --budgets 4 --contestants "labels;kd;at" --minutes 30
    python benchmarks/board.py --table                          train nothing, write the page of what is there

The recipes of benchmarks/recipes want ``--images``, and that of CIFAR-10 the published ResNet-56 of docs/teachers.md.

A cell is one student: a data set (the name of a recipe, or a file), a budget in epochs, a contestant, a seed.  Cells
differ in nothing else: same student, optimizer, images, order and views.  The teacher of a data set is trained once;
its outputs are cached and shared by all cells of a seed that take logits.  Nothing is chosen by the test split: each
contestant has one setting, fixed before its first run, and the best epoch is picked on val.

A cell is done when its ``results.json`` is there, so the script can be interrupted and started again; a run that was
under way is resumed.  After ``--minutes`` no further cell is started, and the page names the cells that are missing.
Seeds come first, then data sets and budgets, so that an interruption leaves whole rounds.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By name: what is put in the recipe's place.  A contestant without a method is the student on labels alone.
CONTESTANTS: dict[str, list[str]] = {
    "labels": [],
    "labels, smoothed": ["training.label_smoothing=0.1"],
    "labels, mixup": ["data.augment.mixup=0.2"],
    "labels, EMA": ["training.ema_decay=0.98"],
    "kd": ["method={name: kd, temperature: 1.0, alpha: 0.5, scaling: paper}"],
    "kd, alpha = 0": ["method={name: kd, temperature: 1.0, alpha: 0.0, scaling: paper}"],
    "kd, T = 4": ["method={name: kd, preset: cifar100, scaling: paper}"],
    "srd": ["method={name: srd, scaling: paper}"],
    "srd, auto": ["method={name: srd, scaling: auto}"],
    "dkd": ["method={name: dkd, scaling: paper}"],
    "dkd, auto": ["method={name: dkd, scaling: auto}"],
    "dist": ["method={name: dist, scaling: paper}"],
    "dist, auto": ["method={name: dist, scaling: auto}"],
    "ls": ["method={name: ls, preset: cifar100, scaling: paper}"],
    "nkd": ["method={name: nkd, scaling: paper}"],
    "wttm": ["method={name: wttm, scaling: paper}"],
    "rkd": ["method={name: rkd, scaling: paper}"],
    "pkt": ["method={name: pkt, scaling: paper}"],
    "cosine": ["method={name: cosine, scaling: paper}"],
    "crd": ["method={name: crd, scaling: paper}"],
    "at": ["method={name: at, scaling: paper}"],
    "at, auto": ["method={name: at, scaling: auto}"],
    "fitnet": ["method={name: fitnet, scaling: paper}"],
    "fitnet, auto": ["method={name: fitnet, scaling: auto}"],
    "kd + at, auto": ["method={name: combined, methods: [{name: kd, temperature: 1.0}, {name: at}], scaling: auto}"],
}
DATA = ("benchmarks/recipes/clothing.yaml", "benchmarks/recipes/cifar10.yaml", "fashion-mnist", "solar")
CLAIM_SEEDS = 3  # fewer give no verdict in a report either
BASELINE = "labels"  # what the others are compared with, seed by seed
FIGURES = (("top1", 100.0, ".2f"), ("ece", 100.0, ".1f"), ("nll", 1.0, ".3f"))


@dataclass(frozen=True)
class Data:
    """A recipe, the images if it names none, and the teacher if it is ready."""

    recipe: str
    images: str | None = None
    ready: str | None = None

    @property
    def name(self) -> str:
        """In tables and folder names."""
        return Path(self.recipe).stem

    def teacher(self, root: Path) -> str:
        """Return the file or run folder of the teacher."""
        return self.ready or str(root / f"{self.name}-teacher")

    def command(self, stage: str, root: Path) -> list[str]:
        """Return the first arguments of ``potstill`` for a stage."""
        images = ["--data", self.images] if self.images else []
        return ["train", self.recipe, "--stage", stage, *images, "--output-dir", str(root)]


@dataclass(frozen=True)
class Cell:
    """One student."""

    data: Data
    epochs: int
    contestant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.contestant).split()
        return "-".join([self.data.name, f"{self.epochs}ep", *(word.lower() for word in words), str(self.seed)])

    @property
    def stage(self) -> str:
        """The stage that is trained."""
        sets = CONTESTANTS[self.contestant]
        return "distilled" if any(text.startswith("method=") for text in sets) else "baseline"

    def command(self, root: Path) -> list[str]:
        """Return the arguments of ``potstill`` that train it."""
        teacher = ["--teacher", self.data.teacher(root)] if self.stage == "distilled" else []
        sets = [part for text in CONTESTANTS[self.contestant] for part in ("--set", text)]
        budget = ["--epochs", str(self.epochs), "--seed", str(self.seed)]
        return [*self.data.command(self.stage, root), *teacher, *sets, *budget, "--name", self.name]

    def results(self, root: Path) -> dict[str, Any] | None:
        """Return its test metrics; None if it is not done."""
        folder = root / self.name
        if not (folder / "results.json").is_file():
            return None
        metrics: dict[str, Any] = json.loads((folder / self.stage / "metrics.json").read_text("utf-8"))["test"]
        return metrics


def list_cells(data: Sequence[Data], budgets: Sequence[int], contestants: Sequence[str], seeds: int) -> list[Cell]:
    """Return all cells, in the order in which they are trained."""
    order = itertools.product(range(seeds), data, budgets, contestants)
    return [Cell(each, epochs, contestant, seed) for seed, each, epochs, contestant in order]


def train(command: Sequence[str], folder: Path) -> bool:
    """Run ``potstill`` with a command, resuming what is under way; return whether it succeeded."""
    resume = ["--resume"] if folder.exists() else []
    done = subprocess.run([sys.executable, "-m", "potstill", *command, *resume], capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(f"potstill {shlex.join(command)}\n{done.stderr}\n")
    return done.returncode == 0


def train_missing(cells: Sequence[Cell], root: Path, until: float) -> None:
    """Train teachers and cells that are not done, until a time of ``time.monotonic``."""
    for cell in cells:
        if cell.results(root) is not None:
            continue
        if time.monotonic() >= until:
            return
        teacher = root / Path(cell.data.teacher(root)).name
        if cell.stage == "distilled" and not cell.data.ready and not (teacher / "results.json").is_file():
            command = [*cell.data.command("teacher", root), "--name", teacher.name]
            if not train(command, teacher):
                sys.exit(f"no teacher for {cell.data.name}")
        state = "done" if train(cell.command(root), root / cell.name) else "failed"
        sys.stderr.write(f"{cell.name} {state}\n")


def format_spread(values: Sequence[float], form: str) -> str:
    """``mean ± sample deviation``; the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


def t_interval(gains: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % t interval, infinite below two seeds."""
    if len(gains) < 2:
        return statistics.mean(gains or [0.0]), math.inf
    from scipy.stats import t

    return statistics.mean(gains), t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))


def format_gain(gains: Sequence[float]) -> str:
    """Mean of paired differences with its 95 % t interval; the difference alone if there is one."""
    mean, half = t_interval(gains)
    if len(gains) < 2:
        return f"{mean:+.2f}" if gains else ""
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def page(cells: Sequence[Cell], root: Path, arguments: str) -> Iterator[str]:
    """Yield the lines of docs/board.md."""
    found = {cell: results for cell in cells if (results := cell.results(root)) is not None}
    yield from (
        "# Board",
        "",
        f"Written by `python benchmarks/board.py{arguments}`, which trains each cell by a command below "
        "and goes on where it was interrupted. Mean ± sample deviation on test; *gain* is the difference in top-1 to "
        f"`{BASELINE}`, paired by seed, with its 95 % t interval from two seeds on. Nothing was tuned for a contestant "
        "and nothing left out but what is named.",
        "",
        *_summary(cells, found),
    )
    for data, epochs in dict.fromkeys((cell.data, cell.epochs) for cell in cells):
        group = [cell for cell in cells if (cell.data, cell.epochs) == (data, epochs)]
        done = {name: {cell.seed: found[cell] for cell in group if cell.contestant == name and cell in found}
                for name in dict.fromkeys(cell.contestant for cell in group)}  # fmt: skip
        missing = {name: [str(cell.seed) for cell in group if cell.contestant == name and cell not in found]
                   for name in done}  # fmt: skip
        yield from ("", f"## {data.name}, {epochs} epochs", "")
        if any(done.values()):
            yield "| contestant | seeds | top-1 | gain | ECE | NLL |"
            yield "| --- | --- | --- | --- | --- | --- |"
        for name, by_seed in done.items():
            if by_seed:
                yield _row(name, by_seed, done.get(BASELINE, {}))
        if any(missing.values()):
            seeds = [f"{name} (seed {', '.join(each)})" for name, each in missing.items() if each]
            yield from ("", f"Not trained: {'; '.join(seeds)}.")
    yield from ("", "## Commands", "", "Seed 0, with what each contestant adds to them:", "", "```sh")
    for data, epochs in dict.fromkeys((cell.data, cell.epochs) for cell in cells):
        for stage in ("baseline", "distilled"):
            teacher = ["--teacher", data.teacher(Path("runs/board"))] if stage == "distilled" else []
            words = [*data.command(stage, Path("runs/board")), *teacher, "--epochs", str(epochs), "--seed", "0"]
            yield f"potstill {shlex.join(words)}"
    yield from ("```", "", "| contestant | added |", "| --- | --- |")
    for name in dict.fromkeys(cell.contestant for cell in cells):
        added = shlex.join([part for text in CONTESTANTS[name] for part in ("--set", text)])
        yield f"| {name} | {f'`{added}`' if added else 'nothing'} |"


def _summary(cells: Sequence[Cell], found: dict[Cell, dict[str, Any]]) -> Iterator[str]:
    groups = list(dict.fromkeys((cell.data, cell.epochs) for cell in found))
    if not groups:
        return
    yield (
        "Gains in points of top-1, by data set and epochs; bold where the interval is above or below 0, with "
        f"{CLAIM_SEEDS} seeds or more:"
    )
    yield ""
    yield f"| contestant | {' | '.join(f'{data.name}, {epochs}' for data, epochs in groups)} |"
    yield f"| --- |{' --- |' * len(groups)}"
    for name in dict.fromkeys(cell.contestant for cell in cells if cell.contestant != BASELINE):
        row = []
        for data, epochs in groups:
            by_seed = {each: {cell.seed: results["top1"] for cell, results in found.items()
                              if (cell.data, cell.epochs, cell.contestant) == (data, epochs, each)}
                       for each in (BASELINE, name)}  # fmt: skip
            gains = [100 * (top1 - by_seed[BASELINE][seed]) for seed, top1 in by_seed[name].items()
                     if seed in by_seed[BASELINE]]  # fmt: skip
            mean, half = t_interval(gains)
            mark = "**" if len(gains) >= CLAIM_SEEDS and abs(mean) > half else ""
            row.append(f"{mark}{mean:+.1f}{mark}" if gains else "")
        yield f"| {name} | {' | '.join(row)} |"


def _row(name: str, by_seed: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> str:
    cells = [format_spread([factor * each[key] for each in by_seed.values()], form) for key, factor, form in FIGURES]
    common = [seed for seed in by_seed if seed in plain and name != BASELINE]
    gain = format_gain([100 * (by_seed[seed]["top1"] - plain[seed]["top1"]) for seed in common])
    return f"| {name} | {len(by_seed)} | {cells[0]} | {gain} | {cells[1]} | {cells[2]} |"


def main() -> None:
    """Train what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(DATA), help="names of recipes, or recipe files")
    parser.add_argument("--images", action="append", default=[], metavar="NAME=DIR", help="where a recipe names none")
    parser.add_argument("--teacher", action="append", default=[], metavar="NAME=FILE", help="one that is ready")
    parser.add_argument("--budgets", default="10,30", help="epochs of the students")
    parser.add_argument("--contestants", default=";".join(CONTESTANTS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after this time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/board"))
    parser.add_argument("--page", type=Path, default=Path("docs/board.md"))
    given = parser.parse_args()
    contestants = [name.strip() for name in given.contestants.split(";")]
    if unknown := [name for name in contestants if name not in CONTESTANTS]:
        parser.error(f"no contestant {unknown[0]!r}; known, separated by semicolons: {'; '.join(CONTESTANTS)}")
    images, teachers = (dict(text.split("=", 1) for text in texts) for texts in (given.images, given.teacher))
    data = [Data(recipe, images.get(name := Path(recipe).stem), teachers.get(name)) for recipe in given.data.split(",")]
    cells = list_cells(data, [int(each) for each in given.budgets.split(",")], contestants, given.seeds)
    if not given.table:
        train_missing(cells, given.output_dir, time.monotonic() + 60 * given.minutes)
    changed = []
    for key in ("data", "images", "teacher", "budgets", "contestants", "seeds"):
        if (value := getattr(given, key)) != parser.get_default(key):
            values = value if isinstance(value, list) else [value]
            changed += [f"--{key} {shlex.quote(str(each))}" for each in values]
    text = "\n".join(page(cells, given.output_dir, "".join(f" {each}" for each in changed)))
    given.page.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
