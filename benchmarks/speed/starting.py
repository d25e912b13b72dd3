"""(e) From the start of the process to the first step of the optimizer, store present: goal the time of ``import torch``
and 1 s; (f) ``potstill --help``: goal 0.15 s.

Both are times of whole processes, taken in turn; the least of the rounds is what the machine can do.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STOP = """
import os, sys
from potstill.cli import main
import torch.optim.optimizer as optimizer
def stop(*_): os._exit(17)
optimizer.register_optimizer_step_pre_hook(stop)
main(sys.argv[1:])
"""
FIRST_STEP = 17


def main(arguments: list[str]) -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(measure(given, Path(folder)))


def measure(given: argparse.Namespace, folder: Path) -> str:
    """Lines for people."""
    sets = [part for each in given.sets for part in ("--set", each)]
    first = ["run", given.recipe, "--root", str(folder), *sets]
    _run([sys.executable, "-m", "potstill", *first, "--set", "training.epochs=1", "--name", "filled"])
    again = [*first, "--name", "again", "--overwrite", "--teacher", str(folder / "filled")]
    commands = {
        "bare Python": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [sys.executable, "-m", "potstill", "--help"],
        "first step": [sys.executable, "-c", STOP, *again],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(given.rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            _run(command, expect=FIRST_STEP if name == "first step" else 0)
            seconds[name].append(time.perf_counter() - started)
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
