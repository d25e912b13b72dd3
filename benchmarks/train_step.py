"""Images per second of a training step by network and memory layout, interleaved so that a noisy machine is fair.

    python benchmarks/train_step.py vgg16_bn torchvision/vgg16_bn --size 64 --batch 64

Each round runs one AdamW step of every variant; the figures are medians over rounds, and the ratio is taken round by
round against the first variant.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from potstill.models.factory import create_model
from potstill.training.devices import create_compute
from potstill.training.optim import create_optimizer
from potstill.training.settings import TrainingSettings


class Variant:
    """One network in one memory layout, with its optimizer and a batch."""

    def __init__(self, name: str, channels_last: bool, size: int, batch: int) -> None:
        self.label = f"{name}, {'channels last' if channels_last else 'channels first'}"
        settings = TrainingSettings(channels_last=channels_last)
        self.compute = create_compute(settings)
        self.network = create_model(name, 4, size=size).train().to(self.compute.device)
        self.network.to(memory_format=self.compute.memory_format)
        self.optimizer = create_optimizer(self.network.named_parameters(), settings)
        images = torch.randn(batch, 3, size, size, device=self.compute.device)
        self.images = images.contiguous(memory_format=self.compute.memory_format)
        self.labels = torch.randint(4, (batch,), device=self.compute.device)

    def step(self) -> float:
        """Seconds of one training step."""
        started = time.perf_counter()
        with self.compute.autocast():
            logits = self.network(self.images)
        nn.functional.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    variants = [
        Variant(name, layout, arguments.size, arguments.batch)
        for name in arguments.networks
        for layout in (False, True)
    ]
    for variant in variants:
        variant.step()
    rounds = [[variant.step() for variant in variants] for _ in range(arguments.rounds)]
    print(f"{variants[0].compute}, batch {arguments.batch}, {arguments.size} px, {arguments.rounds} rounds")
    for variant, seconds in zip(variants, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(row[0] / own for row, own in zip(rounds, seconds, strict=True))
        print(f"{variant.label:<45} {arguments.batch / statistics.median(seconds):7.1f} images/s   {ratio:5.2f} x")


if __name__ == "__main__":
    main()
