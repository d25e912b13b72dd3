"""Distillation on a GPU as ratios: stored answers, input, layouts, compiling, against a naive loop; one table.

    benchmarks/gpu.sh                       everything, well within ten minutes
    python -m benchmarks.gpu --quick        small networks and images, in seconds, on a CPU too: does it still run?

Contestants take turns within a measure, in blocks of steps, and the device is waited for at the end of each block only:
what a step costs to launch counts, as in training.  Ratios are medians over rounds of neighbours.  What fails or finds
no time is named below the table; nothing else is lost.
"""

import argparse
import itertools
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from benchmarks.speed.clock import Watch, mark_of
from benchmarks.speed.ours import optimize_for_inference, teacher_precision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.evaluation.metrics import StreamingMetrics, TermAverages
from potstill.input_spec import InputSpec
from potstill.methods.kd import KD, kd_loss
from potstill.methods.supervised import Supervised
from potstill.models.factory import create_model
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute, create_compute
from potstill.training.optim import GradientAccumulator, create_optimizer
from potstill.training.settings import TrainingSettings
from potstill.training.student_forward import StudentCompiler
from potstill.types import Batch

TEMPERATURE = 2.0
SAMPLES = 50_000  # of the store that is read
# Dense bf16, FLOP/s, by a part of the device's name; the first that fits.
NOMINAL = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
}  # fmt: skip

COMPILED = "bf16, channels last, compiled"

Turn = Callable[[], None]


@dataclass
class Bench:
    """What is measured on, and the lines of the table."""

    quick: bool
    deadline: float  # of time.monotonic(), after which no further measure begins
    teacher_name: str
    student_name: str
    folder: Path  # for stores
    compute: Compute = field(default_factory=lambda: create_compute(TrainingSettings()))
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    precision: str = ""  # in which its teachers run
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of stores

    @property
    def size(self) -> int:
        """Of images, in pixels."""
        return 32 if self.quick else 64

    @property
    def batches(self) -> tuple[int, ...]:
        """Images per step that are measured."""
        return (8,) if self.quick else (32, 128, 512)

    @property
    def steps(self) -> int:
        """Of a block."""
        return 2 if self.quick else 20

    def each_batch(self) -> Iterator[int]:
        """``batches``, as long as there is time.

        Raises:
            TooLate: there is none.
        """
        for batch in self.batches:
            if time.monotonic() > self.deadline:
                raise TooLate(f"from B={batch} on")
            yield batch

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()

    def race(self, turns: dict[str, Turn], rounds: int | None = None) -> dict[str, list[float]]:
        """Seconds of each block by contestant; the first block of each does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        names = list(turns)
        for number in range(1 + (rounds or (2 if self.quick else 7))):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                self.wait()
                started = time.perf_counter()
                turns[name]()
                self.wait()
                if number:
                    seconds[name].append(time.perf_counter() - started)
        return seconds

    def row(self, what: str, value: str, goal: str = "", note: str = "") -> None:
        """Another line of the table."""
        self.rows.append((what, value, goal, note))
        print(f"  {what}: {value}", file=sys.stderr, flush=True)


class TooLate(Exception):
    """There is no time left for another measure."""


class Listed:
    """One resident batch, shown again and again under other sample ids: what a Loader tells of its epochs."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch = batch
        random = np.random.default_rng(0)
        self.ids = [random.choice(SAMPLES, len(batch), replace=False) for _ in range(steps)]

    def ids_of(self, epoch: int) -> list[np.ndarray]:
        """Of each step of a block."""
        return self.ids

    def views_of(self, epoch: int) -> list[int]:
        """There is one view."""
        return [0] * len(self.ids)

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """The batch, once."""
        yield self.batch


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Median over rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds[name], seconds[to], strict=True))


class Student:
    """One way of training the student: ``block()`` is some steps, as the loop does them."""

    def __init__(self, bench: Bench, batch: int, kind: str, **settings: object) -> None:
        self.bench, self.kind = bench, kind
        options = {"batch_size": batch, "compile": False, **settings}
        self.settings = TrainingSettings.model_validate(options)
        self.compute = create_compute(self.settings)
        device, layout = self.compute.device, self.compute.memory_format
        torch.manual_seed(0)
        self.student = create_model(bench.student_name, 4, size=bench.size).to(device).to(memory_format=layout)
        teacher = None
        if kind in ("live", "stored", "naive"):
            teacher = create_model(bench.teacher_name, 4, size=bench.size).to(device).to(memory_format=layout)
        method = Supervised() if teacher is None else KD(temperature=TEMPERATURE)
        self.distiller = Distiller(self.student, teacher, method)
        self.optimizer = create_optimizer(self.distiller.trained_parameters(), self.settings)
        parameters = list(self.student.parameters())
        self.gradients = GradientAccumulator(self.optimizer, parameters, self.compute.gradient_scaler())
        images = torch.randn(batch, 3, bench.size, bench.size, device=device)
        self.batch = Batch(images.contiguous(memory_format=layout), torch.arange(batch, device=device) % 4)
        self.listed = Listed(self.batch, bench.steps)
        if kind in ("live", "stored"):
            optimize_for_inference(self.distiller, self.listed, self.compute)
            bench.precision = teacher_precision(self.distiller)
        self.recorded = self._filled() if kind == "stored" else None
        self.compiling = StudentCompiler(
            self.distiller,
            self.optimizer,
            self.settings,
            self.compute,
            SilentObserver(),
            compile=_compile_nothing if bench.quick else torch.compile,
        )

    def _filled(self) -> CachedTeacherOutputs:
        """Answers that are all there, in a store on disk."""
        record = RecordFormat("float16", 4)
        store = TeacherCache.open(self.bench.folder, {"number": next(self.bench.numbers)}, record, SAMPLES, {})
        logits = np.random.default_rng(0).normal(size=(SAMPLES, 4)).astype(np.float32)
        store.write(0, np.arange(SAMPLES), record.encode(logits))
        store.flush()
        return CachedTeacherOutputs(self.distiller, self.listed, [store], autocast=self.compute.autocast, warn=_fail)

    def block(self) -> None:
        """Some steps."""
        if self.recorded is not None:
            self.recorded.start_epoch(0)
        with self.compiling.epoch(self.bench.steps, 10**9):
            self.compiling.prepare(self.batch.images)
            for _ in range(self.bench.steps):
                self.step(self.batch)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; the teacher's answer is read as a store gives it, asked for, or not needed."""
        if self.kind == "naive":
            return self._naive(batch)
        known = None if self.recorded is None else self.recorded(batch)
        with self.compute.autocast():
            step = self.distiller(batch.images, batch.labels, teacher=known)
        self.gradients.add(step)
        self.gradients.step()
        return step.logits.detach(), step.terms

    def _naive(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As tutorials write it: float32, the teacher at every step, the loss read at every step."""
        with torch.no_grad():
            said = self.distiller.teacher.networks[0](batch.images)
        logits = self.student(batch.images)
        labels = nn.functional.cross_entropy(logits, batch.labels)
        loss = 0.5 * labels + 0.5 * kd_loss(logits, said, temperature=TEMPERATURE)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        return logits, {}


def _compile_nothing(forward: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """In place of torch.compile, where the question is whether this program runs."""
    return lambda *arguments: forward(*arguments)


def _fail(message: str) -> None:
    raise RuntimeError(message)


# measures


def distillation(bench: Bench) -> None:
    """(a), (h): a stored and a live step, and a naive one, against a plain one."""
    for batch in bench.each_batch():
        ways = {kind: Student(bench, batch, kind) for kind in ("plain", "stored", "live")}
        ways["naive"] = Student(bench, batch, "naive", precision="float32", channels_last=False)
        seconds = bench.race({name: way.block for name, way in ways.items()})
        rate = batch * bench.steps / statistics.median(seconds["plain"])
        bench.row(f"plain training, B={batch}", f"{rate:,.0f} images/s")
        bench.row(f"(a) stored KD / plain, B={batch}", f"{ratio(seconds, 'stored', 'plain'):.3f}", "<= 1.03")
        bench.row(f"live KD / plain, B={batch}", f"{ratio(seconds, 'live', 'plain'):.2f}")
        note = "on resident batches: no decoding on either side"
        bench.row(f"(h) naive / stored KD, B={batch}", f"{ratio(seconds, 'naive', 'stored'):.2f}", "", note)


def layouts(bench: Bench) -> None:
    """Precision, memory layout and compiling, each against float32 with channels first."""
    kinds: dict[str, dict[str, object]] = {
        "float32": {"precision": "float32", "channels_last": False},
        "bf16": {"precision": "bf16", "channels_last": False},
        "bf16, channels last": {"precision": "bf16", "channels_last": True},
    }
    if bench.compute.device.type == "cuda":
        kinds["fp16, channels last"] = {"precision": "fp16", "channels_last": True}
    if bench.compute.device.type == "cuda" or bench.quick:
        kinds[COMPILED] = {"precision": "bf16", "channels_last": True, "compile": True}
    for batch in bench.each_batch():
        ways = {name: Student(bench, batch, "plain", **options) for name, options in kinds.items()}
        seconds = bench.race({name: way.block for name, way in ways.items()})
        for name in list(kinds)[1:]:
            bench.row(f"float32 / {name}, B={batch}", f"{ratio(seconds, 'float32', name):.2f}", "", "faster by")
        if COMPILED in kinds:
            _report_compiling(bench, ways, seconds, batch)


def _report_compiling(bench: Bench, ways: dict[str, Student], seconds: dict[str, list[float]], batch: int) -> None:
    """What ``training.compile: auto`` supposes, and what is so."""
    plain, compiled = "bf16, channels last", COMPILED
    if ways[compiled].compiling.compiled_forward is None:
        bench.row(f"compiling, B={batch}", "failed")
        return
    gain = 1 - ratio(seconds, compiled, plain)
    bench.row(f"time of a step that compiling saves, B={batch}", f"{gain:.0%}", "20 % supposed")


def efficiency(bench: Bench) -> None:
    """(c): FLOP/s of training and of a teacher in bf16, against this device's best matrix product."""
    device = bench.compute.device
    side = 256 if bench.quick else 8192
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    repeat = 2 if bench.quick else 20
    best = min(bench.race({"product": lambda: [one @ other for _ in range(repeat)] and None})["product"])
    peak = 2 * side**3 * repeat / best
    bench.row("best bf16 matrix product", f"{peak / 1e12:,.1f} TFLOP/s")
    cases = [(bench.student_name, bench.size, batch) for batch in bench.batches]
    cases.append(("cifar/resnet14", 40, 8) if bench.quick else ("resnet50", 224, 128))
    for name, size, batch in cases:
        rate = _training_flops(bench, name, size, batch)
        bench.row(f"(c) {name} at {size} px, training, B={batch}", f"{rate / peak:.2f} of that")
        nominal = next((value for key, value in NOMINAL.items() if key in _device_name(bench)), None)
        if bench.quick and nominal is None:
            nominal = 1e12  # of no device
        if nominal is not None:
            goal = ">= 0.20" if name == "resnet50" else ""
            bench.row(f"(c) {name} at {size} px, training, B={batch}", f"{rate / nominal:.2f} of nominal", goal)
    for batch in bench.each_batch():
        rate = _teacher_flops(bench, batch)
        bench.row(f"(c) {bench.teacher_name} at {bench.size} px, answers, B={batch}", f"{rate / peak:.2f} of that")


def _training_flops(bench: Bench, name: str, size: int, batch: int) -> float:
    way = Student(bench, batch, "plain")
    if (name, size) != (bench.student_name, bench.size):
        way = Student(Bench(bench.quick, bench.deadline, bench.teacher_name, name, bench.folder), batch, "plain")
        images = torch.randn(batch, 3, size, size, device=bench.compute.device)
        way.batch.images = images.contiguous(memory_format=way.compute.memory_format)
    with FlopCounterMode(display=False) as counter:
        way.step(way.batch)
    seconds = bench.race({"training": way.block})["training"]
    return counter.get_total_flops() * bench.steps / statistics.median(seconds)


def _teacher_flops(bench: Bench, batch: int) -> float:
    way = Student(bench, batch, "live")
    teachers, images = way.distiller.teacher, way.batch.images
    plain = create_model(bench.teacher_name, 4, size=bench.size).eval().to(images.device)

    def block() -> None:
        with way.compute.autocast():
            for _ in range(bench.steps):
                teachers.run(images)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(images)
    return counter.get_total_flops() * bench.steps / statistics.median(bench.race({"answers": block})["answers"])


def pipeline(bench: Bench) -> None:
    """(b), (j): the whole input against one resident batch; what metrics cost in a whole epoch."""
    count = 64 if bench.quick else 20_480  # whole batches only, or the resident one would have more to do
    pixels = np.random.default_rng(0).integers(0, 256, (count, bench.size, bench.size, 3), dtype=np.uint8)
    images = ArraySet(pixels, np.arange(count) % 4, [f"made/{i:05d}" for i in range(count)])
    light = AugmentSettings(hflip=True, pad_crop=0.1)
    crops = AugmentSettings(hflip=True, crop_scale=(0.35, 1.0))
    for batch in bench.each_batch():
        for name, augment in (("shifts", light), ("random crops", crops)):
            way = Student(bench, batch, "plain")
            loader = Loader(
                images, InputSpec(bench.size), batch_size=batch, augment=augment, order="shuffled",
                device=bench.compute.device,
            )  # fmt: skip
            assert loader.count == loader.steps * batch
            turns = _epochs(bench, way, loader)
            if name == "shifts":
                turns["host"] = _epochs(bench, way, _on_host(loader, images, light, bench))["input"]
            seconds = bench.race(turns, rounds=1 if bench.quick else 3)
            share = ratio(seconds, "resident", "input")
            bench.row(f"(b) pipeline / resident, {name}, B={batch}", f"{share:.3f}", ">= 0.95")
            if name == "shifts":
                share = ratio(seconds, "resident", "host")
                bench.row(f"(b) pixels on the host, read ahead / resident, B={batch}", f"{share:.3f}", ">= 0.95")
                cost = ratio(seconds, "input and metrics", "input") - 1
                bench.row(f"(j) metrics, share of an epoch, B={batch}", f"{cost:.2%}", "<= 1 %")


def _on_host(loader: Loader, images: ArraySet, augment: AugmentSettings, bench: Bench) -> Loader:
    """The same loader with its pixels in the memory of the CPU, as where they are mapped from a file."""
    device, pixels = bench.compute.device, loader._pixels
    assert pixels is not None
    found = Loader(
        images, loader.spec, batch_size=loader.epochs.largest_batch, augment=augment, order="shuffled", device=device
    )
    found._pixels = pixels.cpu()
    return found


def _epochs(bench: Bench, way: Student, loader: Loader) -> dict[str, Turn]:
    """Whole epochs of the same number of steps."""
    layout = way.compute.memory_format

    def resident() -> None:
        for _ in range(loader.steps):
            way.step(way.batch)

    def shown() -> None:
        for batch in loader.epoch(0):
            batch.images = batch.images.contiguous(memory_format=layout)
            way.step(batch)

    def counted() -> None:
        metrics, averages = StreamingMetrics(4, device=bench.compute.device), TermAverages()
        for batch in loader.epoch(0):
            batch.images = batch.images.contiguous(memory_format=layout)
            logits, terms = way.step(batch)
            metrics.update(logits, batch.labels)
            averages.update(terms, len(batch))
        metrics.compute()
        averages.compute("here")

    return {"resident": resident, "input": shown, "input and metrics": counted}


def _device_name(bench: Bench) -> str:
    device = bench.compute.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, no GPU"


# Compiling takes minutes: last.
MEASURES = {"distillation": distillation, "pipeline": pipeline, "efficiency": efficiency, "layouts": layouts}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"some of {', '.join(MEASURES)}; all")
    parser.add_argument("--quick", action="store_true", help="small networks and images, few steps")
    parser.add_argument("--teacher", default=None)
    parser.add_argument("--student", default=None)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further measure begins")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.measures if name not in MEASURES]:
        parser.error(f"no measure {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    if arguments.quick:
        torch.set_num_threads(1)  # nothing that depends on the machine's other work
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # `timeout` sends it; the table is printed still
    with tempfile.TemporaryDirectory() as folder:
        return _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> int:
    bench = Bench(
        arguments.quick,
        time.monotonic() + 60 * arguments.minutes,
        arguments.teacher or ("cifar/resnet20" if arguments.quick else "vgg16"),
        arguments.student or ("cifar/resnet8" if arguments.quick else "resnet18"),
        folder,
    )
    left, failed, watch = dict.fromkeys(arguments.measures or MEASURES, "not begun"), [], Watch()
    try:
        for name in list(left):
            if time.monotonic() > bench.deadline:
                break
            left[name] = "not finished"
            try:
                MEASURES[name](bench)
                del left[name]
            except TooLate as late:
                left[name] = str(late)
            except Exception as error:  # of memory, of a compiler: other measures may do well
                left.pop(name)
                failed.append(f"{name}: {type(error).__name__}: {error}")
    finally:
        _print_table(bench, mark_of(watch.others()))
        for name, how in left.items():
            print(f"not measured, for lack of time: {name}, {how}")
        for line in failed:
            print(f"failed: {line}")
    return 1 if failed else 0


def _print_table(bench: Bench, mark: str) -> None:
    print(f"{_device_name(bench)}, {bench.compute.precision}, torch {torch.__version__}{mark}")
    print(f"{bench.teacher_name} -> {bench.student_name} at {bench.size} px, blocks of {bench.steps} steps")
    print(f"teacher runs in {bench.precision or 'the precision of autocast'}\n")
    widths = [max((len(row[at]) for row in bench.rows), default=0) for at in range(3)]
    for row in bench.rows:
        print("  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3]]).rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
