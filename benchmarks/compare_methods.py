"""Several methods under one budget, several seeds: the table of LOG.md.

Every student has the same architecture, epochs, optimizer, images, order and views; seeds differ in initialisation,
order and views.  The teacher is trained once.  Nothing is chosen by the test split, and nothing is left out: each
method takes the options of METHODS below, the authors' for CIFAR-100 but for warm-ups, which are 20 of 240 epochs there
and scaled to one epoch here.

Usage: python benchmarks/compare_methods.py [--output-dir runs/compare] [--seeds 3] [--jobs 2] [--set key=value ...]

It can be interrupted and started again: what is done is kept.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "supervised": {},  # the baseline
    "kd": {"preset": "cifar100"},
    "ls": {"preset": "cifar100"},
    "dkd": {"warmup_epochs": 1.0},
    "dist": {},
    "nkd": {"preset": "cifar100"},
    "at": {},
    "fitnet": {},
    "rkd": {},
    "crd": {},
    "srrl": {},
}


def train(recipe: str, root: Path, name: str, method: str, seed: int, sets: list[str]) -> None:
    """One student in a process of its own, on one thread; nothing where it is done already."""
    if (root / name / "results.json").is_file():
        return
    settings = {"name": method, **METHODS[method]}
    changes = [*sets, f"method={json.dumps(settings)}"] if method != "supervised" else sets
    stages = (
        ("teacher",) if name == "teacher" else ("baseline",) if method == "supervised" else ("teacher", "distilled")
    )
    teacher = None if name == "teacher" or method == "supervised" else str(root / "teacher")
    order = json.dumps([recipe, changes, {"--seed": seed, "--teacher": teacher}, str(root), name, stages])
    command = [sys.executable, __file__, "--worker", order]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    sys.stderr.write(f"{name} done\n")


def work(recipe: str, sets: list[str], flags: dict[str, Any], root: str, name: str, stages: list[str]) -> None:
    """One order, carried out in this process."""
    from potstill.config.recipe import load_recipe
    from potstill.experiment.pipeline import run

    checked = load_recipe(recipe, sets, flags=flags)
    run(checked, output_dir=Path(root), name=name, overwrite=(Path(root) / name).exists(), stages=tuple(stages))


def figures(folder: Path, stage: str) -> dict[str, float]:
    """What the test split said."""
    metrics = json.loads((folder / stage / "metrics.json").read_text("utf-8"))
    test = metrics["test"]
    return {
        **{key: 100 * test[key] for key in ("top1", "ece")},
        "nll": test["nll"],
    }


def table(root: Path, methods: list[str], seeds: int) -> str:
    """Mean and sample deviation of each figure; the difference to the baseline is paired by seed."""
    found = {
        method: [figures(root / f"{method}-{seed}", "baseline" if method == "supervised" else "distilled")
                 for seed in range(seeds)]
        for method in methods
    }  # fmt: skip
    lines = ["| method | top-1 | paired difference | ECE | NLL |", "| --- | --- | --- | --- | --- |"]
    plain = found["supervised"]
    for method, runs in found.items():
        gains = [run["top1"] - other["top1"] for run, other in zip(runs, plain, strict=True)]
        difference = "" if method == "supervised" else f"{spread(gains, '+.2f')} {interval(gains)}"
        cells = [
            spread([run[key] for run in runs], form) for key, form in (("top1", ".2f"), ("ece", ".1f"), ("nll", ".3f"))
        ]
        lines.append(f"| {method} | {cells[0]} | {difference} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """``mean ± deviation``."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{form}} ± {deviation:{form.lstrip('+')}}"


def interval(values: list[float]) -> str:
    """The 95 % t interval of the mean, as in the log's other tables."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"({statistics.mean(values) - half:+.2f} to {statistics.mean(values) + half:+.2f})"


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion-mnist")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(*json.loads(given.worker))
        return
    methods = given.methods.split(",")
    train(given.recipe, given.root, "teacher", "supervised", 0, given.sets)
    with ThreadPoolExecutor(given.jobs) as pool:
        # Seed by seed, so that methods of one seed run side by side and an interruption leaves whole seeds.
        waiting = [
            pool.submit(train, given.recipe, given.root, f"{method}-{seed}", method, seed, given.sets)
            for seed in range(given.seeds)
            for method in methods
        ]
        for each in waiting:
            each.result()
    sys.stdout.write(table(given.root, methods, given.seeds) + "\n")


if __name__ == "__main__":
    main()
