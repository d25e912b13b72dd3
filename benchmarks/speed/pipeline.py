"""(b) Images per second of training through the whole input pipeline by those on one batch that stays in memory, laid
out as the network wants it: goal 0.98 from packed pixels, 0.85 from JPEG files that are decoded in every epoch.

The same student trains in all three.  Files are decoded by ``--workers`` processes beside the training, so leave a core
for each.  Packed pixels are mapped from a file; making it is not timed here (``race`` says what it costs).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.speed.clock import take_turns
from benchmarks.speed.ours import loader, settings
from benchmarks.speed.scene import Scene, add_arguments, make_scene, workplace

from potstill.data.loader import Loader
from potstill.training.devices import Compute, create_compute
from potstill.training.optim import create_optimizer


def main(arguments: list[str]) -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, images=1024)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode JPEG files")
    given = parser.parse_args(arguments)
    with workplace() as folder:
        print(measure(given, folder))


def measure(given: argparse.Namespace, folder: Path) -> str:
    """Lines for people."""
    scene = make_scene(given, folder)
    packed = loader(scene)
    decoding = loader(scene, identity=None, cache_fraction=1e-12, workers=given.workers)
    assert packed.resident
    assert not decoding.resident
    compute = create_compute(settings(scene))
    step = _step(scene, compute)
    kept = next(iter(packed.epoch(0)))
    images = kept.images.contiguous(memory_format=compute.memory_format)
    numbers = iter(range(1_000_000))

    def resident() -> None:
        for batch in packed.epochs.batches(0):
            step(images[: len(batch)], kept.labels[: len(batch)])

    def through(source: Loader) -> Callable[[], None]:
        def turn() -> None:
            for batch in source.epoch(next(numbers)):
                step(batch.images, batch.labels)

        return turn

    contestants = {"resident": resident, "packed": through(packed), "JPEG": through(decoding)}
    result = take_turns(contestants, given.rounds)
    workers = f"{given.workers} process{'' if given.workers == 1 else 'es'} for JPEG files"
    lines = [f"(b) {given.student}, {given.size} px, batch {scene.batch}, {compute}, {workers}{result.mark}"]
    for name, goal in (("packed", 0.98), ("JPEG", 0.85)):
        middle, least, most = result.ratio("resident", name)
        lines.append(f"{name + ' / resident':<20} {middle:.3f}  ({least:.3f} to {most:.3f})  goal >= {goal}")
    return "\n".join(lines)


def _step(scene: Scene, compute: Compute) -> Callable[[torch.Tensor, torch.Tensor], None]:
    student = scene.student().train().to(memory_format=compute.memory_format)
    optimizer = create_optimizer(student.named_parameters(), settings(scene))

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with compute.autocast():
            logits = student(images.contiguous(memory_format=compute.memory_format))
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
