"""(c) Floating-point operations per second by the best that this machine reaches: goal 0.45 for training at batches of
64 and more, 0.85 for the teacher's answers.

The best is the fastest of some bf16 (or float32, where the hardware lacks bf16) matrix products and convolutions, each
repeated within a turn.  Operations are those of convolutions and matrix products, counted on the network as it was
built; time is that of everything in a step.  Batches are resident and laid out: what input costs is ``pipeline``'s.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.speed.clock import Result, table, take_turns
from benchmarks.speed.ours import Ours, teacher_precision
from benchmarks.speed.scene import add_arguments, make_scene, workplace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Turn = Callable[[], object]

REPEATED = 3  # a single product is too short a turn


def main(arguments: list[str]) -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--matrix", type=int, default=2048, help="rows and columns of the matrix product")
    given = parser.parse_args(arguments)
    with workplace() as folder:
        print(measure(given, folder))


def measure(given: argparse.Namespace, folder: Path) -> str:
    """Lines for people."""
    scene = make_scene(given, folder)
    ours = Ours(scene, folder, "live")
    batch = next(iter(ours.loader.epoch(0)))
    ours.distiller.train()
    teachers = ours.distiller.teacher
    assert teachers is not None
    images = batch.images.contiguous(memory_format=ours.compute.memory_format)
    student = ours.distiller.student

    def train() -> None:
        with ours.compute.autocast():
            logits = student(images)
        nn.functional.cross_entropy(logits.float(), batch.labels).backward()
        ours.training.optimizer.step()
        ours.training.optimizer.zero_grad()

    def ask() -> None:
        with ours.compute.autocast():
            teachers.run(images)

    scene_flops = {
        "training": _flops(scene.student(), images, backward=True),
        "teacher": _flops(scene.teacher(), images, backward=False),
    }
    yardsticks = _yardsticks(given.matrix, ours.compute.bf16)
    turns: dict[str, Turn] = {"training": train, "teacher": ask} | {
        name: turn for name, (turn, _) in yardsticks.items()
    }
    work = scene_flops | {name: flops for name, (_, flops) in yardsticks.items()}
    result = take_turns(turns, given.rounds)
    how = teacher_precision(ours.distiller) or "the precision of autocast"
    return f"(c) {ours.compute}, batch {len(images)}, {given.size} px, teacher runs in {how}{result.mark}\n" + _shares(
        result, work
    )


def _shares(result: Result, work: dict[str, float]) -> str:
    speeds = {name: work[name] / result.median(name) for name in work}
    best = max(speed for name, speed in speeds.items() if name not in ("training", "teacher"))
    goals = {"training": ">= 0.45", "teacher": ">= 0.85"}
    rows = [(name, f"{speed / 1e9:.1f}", f"{speed / best:.2f}", goals.get(name, "")) for name, speed in speeds.items()]
    return table(("what", "GFLOP/s", "of the best", "goal"), rows)


def _yardsticks(size: int, bf16: bool) -> dict[str, tuple[Turn, float]]:
    kind = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(size, size).to(kind) for _ in range(2))

    def multiply() -> None:
        for _ in range(REPEATED):
            left @ right

    found: dict[str, tuple[Turn, float]] = {f"matrix product of {size}": (multiply, REPEATED * 2.0 * size**3)}
    for channels, side in ((256, 16), (512, 8)):
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(kind).to(memory_format=torch.channels_last).eval()
        images = torch.randn(64, channels, side, side).to(kind).contiguous(memory_format=torch.channels_last)

        def convolve(layer: nn.Conv2d = layer, images: torch.Tensor = images) -> None:
            with torch.inference_mode():
                for _ in range(REPEATED):
                    layer(images)

        work = REPEATED * 2.0 * 64 * 9 * channels**2 * side**2
        found[f"convolution {channels} x {side} x {side}"] = (convolve, work)
    return found


def _flops(network: nn.Module, images: torch.Tensor, *, backward: bool) -> float:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = network(images)
        if backward:
            logits.sum().backward()
    return float(counter.get_total_flops())
