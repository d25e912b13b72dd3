"""(h) Images per second of a whole distilling loop, from JPEG files, against the peers: goal 5x naive and torchdistill,
3x timm's best with a warm store; 2.2x naive and 1.2x timm's best with a cold one.

Each turn is one epoch over the same files: crop, mirror, teacher, student, optimizer.  Peers decode their files in each
epoch, as they do it; potstill decodes them once before, into the cache, which is timed by itself.  Timed in CPU seconds
of the process and its children with one thread, so that a neighbour counts for nothing; ``--wall`` takes the clock on
the wall, and then ``--workers`` lets the peers decode beside the training.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.speed import peers
from benchmarks.speed.clock import Result, Turn, clock_of, table, take_turns
from benchmarks.speed.ours import Ours, loader, teacher_precision
from benchmarks.speed.scene import Scene, add_arguments, make_scene, workplace

NAIVE, DISTILL = "naive tutorial loop", "torchdistill"
TIMM = ("timm task, float32", "timm task, bf16 + channels last")
COLD, WARM = "potstill, cold store", "potstill, warm store"
GOALS = ((WARM, NAIVE, 5.0), (WARM, DISTILL, 5.0), (WARM, "timm", 3.0), (COLD, NAIVE, 2.2), (COLD, "timm", 1.2))


def main(arguments: list[str]) -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, batch=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="batch sizes")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode for each peer")
    parser.add_argument("--wall", action="store_true")
    given = parser.parse_args(arguments)
    for batch in given.batches:
        with workplace() as folder:
            print(race(given, folder, batch), flush=True)


def race(given: argparse.Namespace, folder: Path, batch: int) -> str:
    """One batch size's table."""
    scene = make_scene(given, folder, batch=batch)
    others, absent = _peers(scene, given.workers)
    once = _decoding_once(scene, given.wall)
    cold, warm = Ours(scene, folder, "cold"), Ours(scene, folder, "warm")
    contestants = others | {
        "potstill, live teacher": Ours(scene, folder, "live").epoch,
        COLD: cold.epoch,
        WARM: warm.epoch,
        "potstill, labels alone": Ours(scene, folder, "labels").epoch,
    }
    result = take_turns(contestants, given.rounds, wall=given.wall)
    count = cold.loader.count
    if (cold.asked, warm.asked) != (count * (given.rounds + 1), count):
        raise RuntimeError(f"of {count} images, the teacher was asked of {cold.asked} (cold) and {warm.asked} (warm)")
    clock = "wall" if given.wall else "CPU"
    title = f"(h) {given.teacher} -> {given.student}, {given.size} px, batch {batch}, {warm.compute}, {clock} time"
    first = once + result.median(COLD)
    return "\n".join(
        [
            title + result.mark,
            *_table(result, scene.images),
            *[f"left out: {name}, {why}" for name, why in absent.items()],
            f"potstill's teacher runs in {teacher_precision(cold.distiller) or 'the precision of autocast'}",
            f"decoding once, before: {1e3 * once / count:.2f} ms/image; a first epoch with it and a cold store: "
            f"{count / first:.0f} images/s, {result.median(NAIVE) / first:.2f} x naive",
            "",
        ]
    )


def _peers(scene: Scene, workers: int) -> tuple[dict[str, Turn], dict[str, str]]:
    """(name -> turn, name -> why it takes no part)"""
    wanted = {
        NAIVE: lambda: peers.naive(scene, workers),
        DISTILL: lambda: peers.torchdistill(scene, workers),
        TIMM[0]: lambda: peers.timm_task(scene, workers, bf16=False),
        TIMM[1]: lambda: peers.timm_task(scene, workers, bf16=True),
    }
    turns: dict[str, Turn] = {}
    absent: dict[str, str] = {}
    for name, make in wanted.items():
        try:
            turns[name] = make()
        except peers.Absent as reason:
            absent[name] = str(reason)
    return turns, absent


def _decoding_once(scene: Scene, wall: bool) -> float:
    """Seconds until decoded pixels are there; all later loaders find them."""
    clock = clock_of(wall)
    started = clock()
    loader(scene)
    return clock() - started


def _table(result: Result, images: int) -> list[str]:
    """Speeds, how many times as fast as each rival, and what of the goals is reached."""
    rivals: Mapping[str, str] = {NAIVE: "naive", DISTILL: "torchdistill"}
    known = {name: name for name in rivals if name in result.seconds}
    if timm := [name for name in TIMM if name in result.seconds]:
        known["timm"] = min(timm, key=result.median)
    rows = []
    for name in result.seconds:
        faster = [f"{result.ratio(rival, name)[0]:.2f}" for rival in known.values()]
        rows.append((name, f"{images / result.median(name):.0f}", *faster))
    head = ("contestant", "images/s", *(f"x {rivals.get(rival, 'timm, its best')}" for rival in known))
    lines = [table(head, rows)]
    for name, rival, goal in GOALS:
        if rival in known:
            middle, least, most = result.ratio(known[rival], name)
            against = rivals.get(rival, "timm's best")
            lines.append(f"{name} / {against}: {middle:.2f}  ({least:.2f} to {most:.2f})  goal >= {goal}")
    return lines
