"""(e) From the start of the process to the first step of the optimizer of the distilled student, its teacher and the
store present: goal the time of ``import torch`` and 1 s; (f) ``potstill --help``: goal 0.15 s.

Both are times of whole processes on the wall, taken in turn; the least of the rounds is what the machine can do.  Other
recipes and data: ``--recipe NAME --set data.source=DIR``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.speed.clock import Watch, mark_of

# As `potstill run`, but without a baseline, and over at the first step.
FIRST_STEP = 17
STOP = f"""
import os, sys
from pathlib import Path
from potstill.cli import run, main
import torch.optim.optimizer as optimizer
root, name, teacher, recipe, stop, *sets = sys.argv[1:]
if stop == "stop":
    optimizer.register_optimizer_step_pre_hook(lambda *_: os._exit({FIRST_STEP}))
folder = dict(output_dir=Path(root), name=name, resume=False, overwrite=True)
flags = {{"--teacher": [teacher] if teacher else None}}
run._pipeline(recipe, sets, flags, stages=("teacher", "distilled"), **folder)
"""


def main(arguments: list[str]) -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    given = parser.parse_args(arguments)

    from benchmarks.speed.scene import workplace  # loads torch, which --help need not wait for

    with workplace() as folder:
        first = prepare(given.recipe, given.sets, folder)
        watch = Watch()
        seconds = take_time(commands(first), given.rounds)
        print(report(seconds) + mark_of(watch.others()))


def prepare(recipe: str, sets: Sequence[str], folder: Path) -> list[str]:
    """Train a teacher and record its answers; make sure that they are found again.

    Returns:
        The command that trains a student from them and ends at its first step.
    """

    def command(name: str, teacher: str, stop: str) -> list[str]:
        short = [*sets, "training.epochs=1", "teacher.training.epochs=1", "teacher_cache.views=1"]
        return [sys.executable, "-c", STOP, str(folder), name, teacher, recipe, stop, *short]

    filled = str(folder / "filled")
    _run(command("filled", "", "go on"))
    _run(command("again", filled, "go on"))
    facts = json.loads((folder / "again" / "distilled" / "model.json").read_text("utf-8"))["facts"]
    if facts["teaching"].get("computed") != 0:
        sys.exit(f"the store was not used: {facts['teaching']}")
    return command("again", filled, "stop")


def commands(first: list[str]) -> dict[str, list[str]]:
    """What is timed."""
    return {
        "bare Python": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [sys.executable, "-m", "potstill", "--help"],
        "first step": first,
    }


def take_time(contestants: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each process in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, command in contestants.items():
            started = time.perf_counter()
            _run(command, expect=FIRST_STEP if name == "first step" else 0)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: Mapping[str, list[float]]) -> str:
    """Lines for people."""
    lines = [
        f"{name:<14} {min(found):.3f} s at least, {sorted(found)[len(found) // 2]:.3f} s in the middle"
        for name, found in seconds.items()
    ]
    beyond = min(seconds["first step"]) - min(seconds["import torch"])
    lines += [
        f"(e) first step - import torch: {beyond:.2f} s  goal <= 1 s",
        f"(f) --help: {min(seconds['--help']):.3f} s  goal <= 0.15 s",
    ]
    return "\n".join(lines)


def _run(command: Sequence[str], expect: int = 0) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != expect:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
