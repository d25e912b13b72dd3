"""What a training step costs by method, beside a step of the same student on labels alone.

    python benchmarks/method_price.py                          all methods, into src/potstill/methods/price.json
    python benchmarks/method_price.py kd crd --output here.json

Steps of the method and plain steps alternate, so that a busy machine slows both; the figures are medians over rounds of
the ratio of neighbours.  Memory is the peak of what is allocated and not yet released within one step (on a CPU from
torch.profiler's record of every allocation, on a GPU from its allocator), without weights and optimizer state.  Each
method is written to the file as soon as it is measured.  Only those named are measured anew; the others stay as they
are, also on another machine, which the new entries then name.  A file of other networks, batches or images is refused.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler is talkative, and reads this when torch is loaded

import torch
from torch import Tensor, nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods import COSTS_FILE, create_method, list_own_methods, method_info
from potstill.methods.base import Method
from potstill.models.factory import create_model
from potstill.types import Batch

IMAGES = 50_000  # of the training set that memories are sized by: CIFAR-100's
SETUP = ("teacher", "student", "batch", "size", "classes")  # entries of one file share these
EPOCH, EPOCHS = 20, 240  # past warm-ups, and within the first part of methods that have two
QUICK: dict[str, dict[str, Any]] = {"ft": {"paraphraser_epochs": 1}}  # what comes before training is no step


class TwoHeads(nn.Module):
    """A student with a second head, for methods that want one."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        width = network.head.in_features
        network.head = nn.Identity()
        self.body, self.head, self.head_dist = network, nn.Linear(width, classes), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        embedding = self.body(images)
        return (self.head(embedding) + self.head_dist(embedding)) / 2


class Bench:
    """Networks and one batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.classes, count, size = arguments.classes, arguments.batch, arguments.size
        torch.manual_seed(0)
        self.student = create_model(arguments.student, self.classes, size=size)
        self.teacher = create_model(arguments.teacher, self.classes, size=size)
        self.images = torch.randn(count, 3, size, size, device=self.device)
        self.second = torch.randn(count, 3, size, size, device=self.device)
        self.train_labels = (torch.arange(IMAGES) % self.classes).to(self.device)
        self.index = torch.randperm(IMAGES)[:count].to(self.device)
        self.labels = self.train_labels[self.index]
        self.view = torch.zeros(count, dtype=torch.int64, device=self.device)
        # Some methods first look at images of every class.
        everyone = torch.arange(self.classes, device=self.device)
        self.before = Batch(torch.randn(self.classes, 3, size, size, device=self.device), everyone, everyone)

    def run(self, name: str) -> "Run":
        """A method, ready for its first step."""
        method = create_method(name, **method_info(name).examples, **QUICK.get(name, {}))
        student = copy.deepcopy(self.student)
        if "head_dist" in method.student_taps:
            student = TwoHeads(student, self.classes)
        count = 2 if method.needs.members else 1
        teachers = [copy.deepcopy(self.teacher).to(self.device) for _ in range(count)]
        return Run(self, student.to(self.device), teachers, method)


class Run:
    """One method in training."""

    def __init__(self, bench: Bench, student: nn.Module, teachers: list[nn.Module], method: Method) -> None:
        self.bench = bench
        self.distiller = Distiller(
            student, teachers, method, example=bench.images[:2], train_labels=bench.train_labels,
            batch_size=len(bench.images),
        ).to(bench.device)  # fmt: skip
        self.second = bench.second if method.needs.second != "none" else None
        self.distiller.prepare(lambda: iter([bench.before]))
        self.distiller.start_epoch(EPOCH, EPOCHS)
        trained = [parameter for _, parameter in self.distiller.trained_parameters()]
        self.adapters = sum(p.numel() for p in trained) - sum(p.numel() for p in bench.student.parameters())
        self.optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step(self) -> tuple[float, float]:
        """Seconds of one training step, and what of them the teacher took."""
        bench = self.bench
        started = self._now()
        said = self.distiller.run_teacher(bench.images, self.second)
        taught = self._now()
        step = self.distiller(
            bench.images, bench.labels, index=bench.index, view=bench.view, second=self.second, teacher=said
        )
        step.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - started, taught - started if said is not None else 0.0

    def peak(self) -> int:
        """Bytes that one step allocates and holds at once."""
        if self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        cpu = [torch.profiler.ProfilerActivity.CPU]
        # Without ``acc_events``, torch 2.11 warns that only one cycle is kept: there is only one.
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
            self.step()
        events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest

    def _now(self) -> float:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(bench: Bench, plain: Run, name: str, rounds: int) -> dict[str, Any]:
    """One method's entry of the file, and under "plain" the steps that it was compared with."""
    run = bench.run(name)
    run.step()
    pairs = [(plain.step()[0], *run.step()) for _ in range(rounds)]
    ratios = [whole / alone for alone, whole, _ in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "time": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "teacher": round(statistics.median(teacher / alone for alone, _, teacher in pairs), 3),
        "memory": round(run.peak() / plain.peak(), 3),
        "adapters": run.adapters,
    }


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all entries of a file have in common."""
    cuda = arguments.device.startswith("cuda")
    return {
        "teacher": arguments.teacher,
        "student": arguments.student,
        "batch": arguments.batch,
        "size": arguments.size,
        "classes": arguments.classes,
        "rounds": arguments.rounds,
        "machine": {
            "processor": torch.cuda.get_device_name() if cuda else processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def processor() -> str:
    """The CPU's name."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def plain_facts(bench: Bench, plain: Run, rounds: int) -> dict[str, float]:
    """A step on labels alone, and what of it the teacher's forward pass would be."""
    kd = bench.run("kd")
    kd.step()
    pairs = [(plain.step()[0], kd.step()[1]) for _ in range(rounds)]
    return {
        "seconds": round(statistics.median(alone for alone, _ in pairs), 4),
        "mebibytes": round(plain.peak() / 2**20, 1),
        "teacher": round(statistics.median(teacher / alone for alone, teacher in pairs), 3),
    }


def main() -> int:
    """Measure, write, and print one line a method; 1 where one could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="all, where none is named")
    parser.add_argument("--teacher", default="cifar/resnet32x4")
    parser.add_argument("--student", default="cifar/resnet8x4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=COSTS_FILE)
    arguments = parser.parse_args()
    names = arguments.methods or list_own_methods()
    bench = Bench(arguments)
    plain = bench.run("supervised")
    plain.step()
    common = facts(arguments)
    old = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    if arguments.methods and (other := [key for key in SETUP if old.get(key, common[key]) != common[key]]):
        differences = ", ".join(f"{key} {old[key]} there, {common[key]} here" for key in other)
        parser.error(f"{arguments.output} was measured with {differences}: give another --output")
    own: dict[str, Any] = {}  # what differs from the file's common facts
    kept = bool(old) and (bool(arguments.methods) or all(old.get(key) == common[key] for key in common))
    if kept:
        own = {key: common[key] for key in ("machine", "rounds") if old[key] != common[key]}
        common = {key: old[key] for key in common}
    plain_entry = old["plain"] if kept else plain_facts(bench, plain, arguments.rounds)
    found = old["methods"] if kept else {}
    failed = 0
    for name in names:
        try:
            found[name] = entry = measure(bench, plain, name, arguments.rounds) | own
        except UsageError as error:
            sys.stderr.write(f"{name}: {error}\n")
            failed += 1
            continue
        content = common | {"plain": plain_entry, "methods": dict(sorted(found.items()))}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name:<12} {entry['time']:6.2f} x time ({entry['low']:.2f} to {entry['high']:.2f}, teacher "
            f"{entry['teacher']:.2f})  {entry['memory']:5.2f} x memory  {entry['adapters']:>10,} adapters",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
