"""(a) A step with stored answers by a plain step, goal 1.02; (a') whole epochs with evaluation, goal 1.05; (j) the
share of a training epoch that metrics take, goal 0.01.

Both train on the same files, cropped alike, in the same batches; one learns from labels alone, the other from recorded
answers too.  (a) takes the median step of each turn, (a') whole epochs with an evaluation on a fifth as many images.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.speed.clock import Result, Turn, take_turns
from benchmarks.speed.ours import Ours
from benchmarks.speed.scene import add_arguments, make_scene, workplace
from torch import Tensor

from potstill.evaluation.metrics import StreamingMetrics


def main(arguments: list[str]) -> None:
    """Print the three ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, images=1024)
    given = parser.parse_args(arguments)
    with workplace() as folder:
        print(measure(given, folder))


def measure(given: argparse.Namespace, folder: Path) -> str:
    """Lines for people."""
    scene = make_scene(given, folder)
    contestants = {"plain": Ours(scene, folder, "labels"), "stored": Ours(scene, folder, "warm")}
    compute = contestants["plain"].compute
    lines = [f"{given.student}, {given.size} px, batch {scene.batch}, {scene.images} images, {compute}"]
    for name, result, goal in (
        ("(a)  stored step / plain step", _steps(contestants, given.rounds), 1.02),
        ("(a') stored epoch / plain epoch", take_turns(_whole(contestants), given.rounds), 1.05),
    ):
        middle, least, most = result.ratio("stored", "plain")
        lines.append(f"{name:<34} {middle:.4f}  ({least:.4f} to {most:.4f})  goal <= {goal}{result.mark}")
    share, held = _metrics(contestants["stored"], given.rounds)
    lines.append(f"{'(j)  metrics / epoch':<34} {share:.4f}  goal <= 0.01")
    lines.append(f"{'     held by metrics':<34} {held / 1024:.0f} KiB for {scene.classes} classes, whatever the images")
    return "\n".join(lines)


def _steps(contestants: dict[str, Ours], rounds: int) -> Result:
    """The median step of each turn: one that somebody interrupts does not count."""
    medians: dict[str, list[float]] = {name: [] for name in contestants}

    def turn(name: str) -> Callable[[], None]:
        return lambda: medians[name].append(statistics.median(contestants[name].steps()))

    result = take_turns({name: turn(name) for name in contestants}, rounds)
    result.seconds = {name: found[-rounds:] for name, found in medians.items()}
    return result


def _whole(contestants: dict[str, Ours]) -> dict[str, Turn]:
    return {name: one.whole_epoch for name, one in contestants.items()}


def _metrics(ours: Ours, rounds: int) -> tuple[float, int]:
    """(median share of a training epoch that passes within StreamingMetrics, bytes that it holds)."""
    original = StreamingMetrics.update, StreamingMetrics.compute
    spent, held, shares = 0.0, 0, []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(metrics: StreamingMetrics, *arguments: Any) -> Any:
            nonlocal spent, held
            started = time.perf_counter()
            try:
                return call(metrics, *arguments)
            finally:
                spent += time.perf_counter() - started
                held = max(held, _bytes(metrics))

        return wrapped

    StreamingMetrics.update, StreamingMetrics.compute = map(timed, original)  # type: ignore[method-assign]
    try:
        for _ in range(rounds):
            spent, started = 0.0, time.perf_counter()
            ours.epoch()
            shares.append(spent / (time.perf_counter() - started))
    finally:
        StreamingMetrics.update, StreamingMetrics.compute = original  # type: ignore[method-assign]
    return statistics.median(shares), held


def _bytes(metrics: StreamingMetrics) -> int:
    found = list(vars(metrics).values())
    found += [value for each in found if isinstance(each, dict) for value in each.values()]
    return sum(value.nbytes for value in found if isinstance(value, Tensor))
