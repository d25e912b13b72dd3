"""(h) Images per second of a whole distilling loop, from JPEG files, against the peers: goal 5x naive and torchdistill,
3x timm's best with a warm store; 2.2x naive and 1.2x timm's best with a cold one.

Each turn is one epoch over the same files: decode, crop, mirror, teacher, student, optimizer.  Timed in CPU seconds of
the process with one thread, so that a neighbour counts for nothing; ``--wall`` takes the clock on the wall.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.speed import peers
from benchmarks.speed.clock import table, take_turns
from benchmarks.speed.ours import Ours
from benchmarks.speed.scene import add_arguments, make_scene


def main(arguments: list[str]) -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="batch sizes, in place of --batch")
    parser.add_argument("--wall", action="store_true")
    given = parser.parse_args(arguments)
    for batch in given.batches:
        with tempfile.TemporaryDirectory() as folder:
            print(race(given, Path(folder), batch), flush=True)


def race(given: argparse.Namespace, folder: Path, batch: int) -> str:
    """One batch size's table."""
    scene = make_scene(given, folder, batch=batch)
    contestants = {
        "naive tutorial loop": peers.naive(scene),
        "torchdistill": peers.torchdistill(scene),
        "timm task, float32": peers.timm_task(scene, bf16=False),
        "timm task, bf16 + channels last": peers.timm_task(scene, bf16=True),
        "potstill, live teacher": Ours(scene, folder, "live").epoch,
        "potstill, cold store": Ours(scene, folder, "cold").epoch,
        "potstill, warm store": Ours(scene, folder, "warm").epoch,
        "potstill, labels alone": Ours(scene, folder, "labels").epoch,
    }
    taking_part = {name: turn for name, turn in contestants.items() if turn is not None}
    result = take_turns(taking_part, given.rounds, wall=given.wall)
    rivals = [name for name in ("naive tutorial loop", "torchdistill") if name in taking_part]
    best = min((name for name in taking_part if name.startswith("timm")), key=result.median)
    rows = []
    for name in taking_part:
        speeds = [f"{scene.images / result.median(name):.0f}"]
        speeds += [f"{result.ratio(rival, name)[0]:.2f}" for rival in (*rivals, best)]
        rows.append((name, *speeds))
    head = ("contestant", "images/s", *(f"x {rival.split(' ')[0]}" for rival in rivals), "x timm's best")
    clock = "wall" if given.wall else "CPU"
    title = f"(h) {given.teacher} -> {given.student}, {given.size} px, batch {batch}, {given.threads} thread(s), {clock} time"
    lacking = [name for name, turn in contestants.items() if turn is None]
    notes = [f"not installed: {', '.join(lacking)}"] if lacking else []
    return "\n".join([title + result.mark, table(head, rows), *notes, ""])
