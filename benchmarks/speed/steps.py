"""(a) a step with stored answers by a plain step, goal 1.02; (a') whole epochs with evaluation, goal 1.05; (j) the share
of an epoch that metrics take, goal 1 %.
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.speed.clock import take_turns
from benchmarks.speed.ours import Ours
from benchmarks.speed.scene import add_arguments, make_scene

from potstill.evaluation.metrics import StreamingMetrics


def main(arguments: list[str]) -> None:
    """Print the three ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, images=1024)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(measure(given, Path(folder)))


def measure(given: argparse.Namespace, folder: Path) -> str:
    """Lines for people."""
    scene = make_scene(given, folder)
    plain, stored = Ours(scene, folder, "labels"), Ours(scene, folder, "warm")
    steps = take_turns({"plain": plain.epoch, "stored": stored.epoch}, given.rounds)
    numbers = iter(range(1_000_000))
    epochs = take_turns(
        {
            name: lambda one=one: one.training._epoch(next(numbers))
            for name, one in (("plain", plain), ("stored", stored))
        },
        given.rounds,
    )
    spent = _metrics_seconds(stored)
    lines = [f"{given.student}, {given.size} px, batch {scene.batch}, {scene.images} images, {plain.compute}"]
    for name, result, goal in (
        ("(a)  stored step / plain step", steps, 1.02),
        ("(a') stored epoch / plain epoch", epochs, 1.05),
    ):
        middle, least, most = result.ratio("stored", "plain")
        lines.append(f"{name:<34} {middle:.4f}  ({least:.4f} to {most:.4f})  goal <= {goal}{result.mark}")
    lines.append(f"{'(j)  metrics / epoch':<34} {spent:.4f}  goal <= 0.01")
    return "\n".join(lines)


def _metrics_seconds(ours: Ours) -> float:
    """Share of a training epoch's time that is spent within StreamingMetrics."""
    spent = [0.0]
    original = StreamingMetrics.update, StreamingMetrics.compute

    def timed(call):  # type: ignore[no-untyped-def]
        def wrapped(*arguments, **options):  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - started

        return wrapped

    StreamingMetrics.update, StreamingMetrics.compute = map(timed, original)  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        ours.epoch()
        return spent[0] / (time.perf_counter() - started)
    finally:
        StreamingMetrics.update, StreamingMetrics.compute = original  # type: ignore[method-assign]
