"""Write the table of networks that comes with the package: size, parameters, multiply-adds and relative latency.

    python scripts/model_table.py [--rounds 5] [--seconds 300]

It continues where it stopped: networks that are in the table already are left as they are.  Delete the file to measure
all of them again.  Parameters and multiply-adds are counted on the meta device, with a head of 10 classes; the
parameters of each further class are those of one output of the head.  The latency is the CPU time of PyTorch in float32
for one image on one thread, relative to ``REFERENCE``, which is timed in turn with each network.
"""

import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

os.environ["HF_HUB_OFFLINE"] = "1"  # no network's code may fetch anything
import torch
from torch import nn

from potstill.evaluation.cost import count_flops, count_parameters
from potstill.input_spec import InputSpec
from potstill.models.model_table import (
    REFERENCE,
    REFERENCE_SIZE,
    SMALL_IMAGE_STUDENTS,
    STUDENTS,
    TABLE_FILE,
    ModelRow,
    read_table,
    write_table,
)
from potstill.models.registry import ALIASES, FAMILIES, build_model, own_size

CANDIDATES = {name for families in (STUDENTS, SMALL_IMAGE_STUDENTS) for family in families.values() for name in family}
MAX_PARAMETERS, MAX_MULTIPLY_ADDS = 30_000_000, 6_000_000_000  # of the networks that are timed
CLASSES = 10
T = TypeVar("T")
TARGET = Path("src/potstill/models") / TABLE_FILE


def candidate_names() -> list[str]:
    """Return the names of all classifiers: potstill's own networks, those of torchvision and of timm."""
    families = ("cifar", "torchvision", "timm")
    return [*ALIASES, *(f"{family}/{name}" for family in families for name in FAMILIES[family].names())]


def build(name: str, classes: int, device: str) -> nn.Module:
    """Return the network with random weights on a device."""
    with torch.device(device):
        return build_model(name, classes, size=own_size(name)).eval()


def check_logits(module: nn.Module, images: object, logits: object) -> None:
    """Raise TypeError if a forward pass gives no logits of one image."""
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, CLASSES):
        raise TypeError(f"it gives {shape} and no logits")


def count(name: str) -> ModelRow:
    """Return the network's row, without its latency; raise whatever its code raises."""
    size = own_size(name)
    failure: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            network = build(name, CLASSES, device)
            network.register_forward_hook(check_logits)
            multiply_adds = count_flops(network, InputSpec(size)) // 2
            parameters = count_parameters(network)
            layers = sum(isinstance(each, (nn.Conv2d, nn.Linear)) for each in network.modules())
            heads = [each for each in network.modules() if isinstance(each, nn.Linear) and each.out_features == CLASSES]
            if len(heads) == 1 and heads[0].bias is not None:
                per_class = heads[0].in_features + 1
            else:
                per_class = count_parameters(build(name, CLASSES + 1, device)) - parameters
            return ModelRow(name, size, parameters, per_class, layers, multiply_adds, None)
        except Exception as error:  # whatever foreign code raises
            failure = error
    assert failure is not None
    raise failure


def measure(row: ModelRow, reference: nn.Module, rounds: int) -> float:
    """Return the latency relative to the reference network's, timed in turn.

    The CPU time of the thread is measured, which on an idle machine is the latency, and which other processes on a
    busy one hardly change.
    """
    networks = [(reference, torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE))]
    networks.append((build(row.name, CLASSES, "cpu"), torch.zeros(1, 3, row.size, row.size)))
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for (network, images), own in zip(networks, times, strict=True):
            started = time.thread_time()
            network(images)
            own.append(time.thread_time() - started)
    theirs, ours = (statistics.median(own[1:]) for own in times)  # the first round is warm-up
    return ours / theirs


class Table:
    """The table that is written, until a deadline."""

    def __init__(self, rounds: int, deadline: float) -> None:
        self.rows = {row.name: row for row in read_table(TARGET)} if TARGET.exists() else {}
        self.rounds, self.deadline = rounds, deadline
        self.reference = build(REFERENCE, CLASSES, "cpu")

    def count(self, names: Sequence[str]) -> None:
        """Add the networks that are not in the table yet."""
        for name in self._each([name for name in names if name not in self.rows], "counted"):
            with self._left_out(name):
                self.rows[name] = count(name)

    def measure(self, names: Sequence[str]) -> None:
        """Add the latency of networks that are small enough, from small to large."""
        rows = [self.rows[name] for name in names if name in self.rows and self.rows[name].latency is None]
        small = [row for row in rows if row.parameters < MAX_PARAMETERS and row.multiply_adds < MAX_MULTIPLY_ADDS]
        for row in self._each(sorted(small, key=lambda row: row.multiply_adds), "timed"):
            with self._left_out(row.name):
                self.rows[row.name] = row._replace(latency=measure(row, self.reference, self.rounds))
            gc.collect()

    def _each(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield items until the deadline, and write the table now and then."""
        for at, item in enumerate(items):
            if time.monotonic() > self.deadline:
                break
            yield item
            if at % 20 == 19:
                write_table(TARGET, self.rows.values())
                sys.stdout.write(f"{what} {at + 1} of {len(items)}\n")
                sys.stdout.flush()
        write_table(TARGET, self.rows.values())

    @contextmanager
    def _left_out(self, name: str) -> Iterator[None]:
        """Leave a network out that cannot be built or run."""
        try:
            yield
        except Exception as error:  # whatever foreign code raises
            self.rows.pop(name, None)
            sys.stdout.write(f"{name}: left out: {(str(error).splitlines() or [type(error).__name__])[0][:150]}\n")


def main() -> None:
    """Count and time the students of a search first, then count all networks, then time the small ones of these."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each network")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time after which it stops")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    table, names = Table(arguments.rounds, deadline), candidate_names()
    candidates = [REFERENCE, *CANDIDATES]
    table.count(candidates)
    table.measure(candidates)
    table.count(names)
    table.measure(names)


if __name__ == "__main__":
    main()
