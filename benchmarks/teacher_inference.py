"""What makes a frozen teacher answer faster: precision of weights, memory layout, folded BatchNorm, inference mode.

    python -m benchmarks.teacher_inference                              VGG16 at 64 px, ResNet50 at 64 and 224 px
    python -m benchmarks.teacher_inference cifar/resnet8@32 --batches 8 --rounds 2

The contestants take turns; a row's ratio is the median over rounds of float32's time by its own in the same round.
Timed in CPU seconds of one thread, so that a neighbour counts for little; on a GPU, and with ``--wall``, by the clock
on the wall.
"""

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable

import torch
from benchmarks.speed.clock import Result, table, take_turns
from torch import Tensor, nn

from potstill.distillation.teacher_inference import InferenceSettings, convert_for_inference
from potstill.models.factory import create_model

NETWORKS = ("vgg16@64", "resnet50@64", "resnet50@224")
FLOAT32 = "float32"
CLASSES = 10

Turn = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each network and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NAME@PIXELS")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="images at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    for text in given.networks:
        name, _, pixels = text.partition("@")
        for batch in given.batches:
            torch.manual_seed(0)
            network = create_model(name, CLASSES, size=int(pixels or 64)).to(device).eval()
            images = torch.randn(batch, 3, int(pixels or 64), int(pixels or 64), device=device)
            result = take_turns(contestants(network, images), given.rounds, wall=given.wall or device.type == "cuda")
            print(f"{text}, {batch} images, {device}{result.mark}\n{_table(result, batch)}\n", flush=True)


def contestants(network: nn.Module, images: Tensor) -> dict[str, Turn]:
    """Return ways to run the same network on the same images."""
    bf16, last = torch.bfloat16, torch.channels_last
    plain, laid_out = copy.deepcopy(network).to(bf16), copy.deepcopy(network).to(bf16).to(memory_format=last)
    wide = copy.deepcopy(network).to(memory_format=last)
    quick, how = convert_for_inference(network, bf16, last, images)
    folded, exactly = convert_for_inference(network, torch.float32, last, images)

    def run(
        network: nn.Module, *, dtype: torch.dtype = torch.float32, autocast: bool = False, **layout: object
    ) -> Turn:
        def turn() -> None:
            with (
                torch.no_grad(),
                torch.autocast(images.device.type, dtype=bf16) if autocast else contextlib.nullcontext(),
            ):
                network(images.to(dtype=dtype, **layout)).float()
            _wait(images.device)

        return turn

    def run_converted(network: nn.Module, how: InferenceSettings) -> Turn:
        def turn() -> None:
            how.logits(network, images)
            _wait(images.device)

        return turn

    return {
        FLOAT32: run(network),
        "float32, channels_last": run(wide, memory_format=last),
        f"float32, BN folded ({exactly.folded}), channels_last, inference mode": run_converted(folded, exactly),
        "autocast bf16": run(network, autocast=True),
        "autocast bf16, channels_last": run(wide, autocast=True, memory_format=last),
        "bf16 weights": run(plain, dtype=bf16),
        "bf16 weights, channels_last": run(laid_out, dtype=bf16, memory_format=last),
        f"bf16 weights, channels_last, BN folded ({how.folded})": run(quick, dtype=bf16, memory_format=last),
        "bf16 weights, channels_last, BN folded, inference mode": run_converted(quick, how),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(result: Result, batch: int) -> str:
    rows = []
    for name, seconds in result.seconds.items():
        ratio, least, most = (1 / each for each in result.ratio(name, FLOAT32))
        rows.append([name, f"{batch / statistics.median(seconds):.1f}", f"{ratio:.2f}", f"{most:.2f} - {least:.2f}"])
    return table(["runs in", "images/s", "x float32", "range"], rows)


if __name__ == "__main__":
    main()
