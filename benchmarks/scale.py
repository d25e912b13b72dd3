"""What a large distillation costs in time, disk and traffic: worked out on paper, and simulated; and what grows with
files and classes in a run on a CPU, measured.

    python -m benchmarks.scale                                     ImageNet-1k and a billion images, three ways to store
    python -m benchmarks.scale --machines 4 --images 5e7 --epochs 30
    python -m benchmarks.scale measure --files 1000 10000 100000 --classes 2 100 10000 --sizes 32 224

Nothing in the first two is measured.  Every number that goes in is an option with its default shown by --help: put in
what your machines do.  The simulation steps through one epoch: each process takes a time of its own for each step, all
wait for the slowest, reading runs ahead of computing as far as the queue lets it, and machines fail.

``measure`` makes JPEG files and prints for each number of files, classes and size, each part in a process of its own:
seconds of CPU until all files are checked and until all splits are packed, cold and once more; peak memory; bytes of
the caches; and seconds of CPU, peak memory and bytes of the end of a run with as many images in each split
(benchmarks/run_end.py).
"""

import argparse
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from potstill.formatting import format_scaled


def option(default: float, text: str) -> float:
    """A field that is also an option of the command line."""
    found: float = field(default=default, metadata={"help": text})
    return found


@dataclass(frozen=True)
class Plan:
    """The numbers that go in; rates are per process."""

    images: float = option(1_281_167, "training images")
    classes: float = option(1000, "classes")
    epochs: float = option(100, "of each student")
    students: float = option(2, "trained in all: baseline and distilled")
    views: float = option(8, "of each image, whose answers are stored")
    record: float = option(2000, "bytes of a stored answer: 2 for each class, or 72 (top16)")
    image_bytes: float = option(110_000, "of an image file")
    side: float = option(256, "pixels of a decoded square; 0: files are decoded anew in each epoch")
    teacher_rate: float = option(1000, "images a second that a process's teacher answers")
    student_rate: float = option(2500, "images a second that a process trains the student on")
    parameters: float = option(25.6e6, "of the student")
    batch: float = option(256, "images of one process in a step")
    machines: float = option(1, "that share the work")
    processes: float = option(8, "on each machine, one an accelerator")
    network: float = option(10e9, "bytes a second between two machines")
    disk: float = option(2e9, "bytes a second that one machine reads from where the images lie")
    jitter: float = option(0.1, "spread of a step's time from process to process: sigma of a log-normal law")
    failures: float = option(5000, "hours between two failures of a machine")
    checkpoint: float = option(60, "seconds between two checkpoints")
    restart: float = option(300, "seconds until all processes run again after a failure")

    @property
    def workers(self) -> float:
        """All processes."""
        return self.machines * self.processes

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.images / (self.batch * self.workers))


@dataclass(frozen=True)
class Cost:
    """Hours, bytes."""

    live: float  # hours, the teacher asked in every step of the distilled students
    stored: float  # hours, it is asked for each view once
    store: float  # bytes on each machine
    pixels: float  # bytes on each machine
    reading: float  # bytes an epoch, all machines together
    sending: float  # bytes an epoch and process, for gradients


def on_paper(plan: Plan) -> Cost:
    """Every part at its full rate; what runs at the same time counts as its slowest part."""
    student, teacher = epoch_seconds(plan, asked=False), epoch_seconds(plan, asked=True)
    distilled = plan.students - 1  # the baseline asks nobody
    live = plan.epochs * (student + distilled * teacher)
    asked = min(plan.views, plan.epochs)
    stored = plan.epochs * plan.students * student + asked * (teacher - student)
    return Cost(
        live=live / 3600,
        stored=stored / 3600,
        store=plan.images * plan.views * plan.record,
        pixels=plan.images * plan.side**2 * 3,
        reading=0.0 if plan.side else plan.images * plan.image_bytes,
        sending=plan.steps * sent_in_a_step(plan),
    )


def epoch_seconds(plan: Plan, *, asked: bool) -> float:
    """Of an epoch; ``asked``: with the teacher."""
    compute = plan.batch * (1 / plan.student_rate + asked / plan.teacher_rate)
    return plan.steps * max(compute + exchange_seconds(plan), reading_seconds(plan))


def sent_in_a_step(plan: Plan) -> float:
    """Bytes that a process sends: a ring passes each float32 gradient on twice, but for one process's share."""
    return 2 * (plan.workers - 1) / plan.workers * 4 * plan.parameters


def exchange_seconds(plan: Plan) -> float:
    """Of the gradients between machines; within a machine they are taken to cost nothing."""
    return sent_in_a_step(plan) / plan.network if plan.machines > 1 else 0.0


def reading_seconds(plan: Plan) -> float:
    """For the images of a step of one machine; decoded pixels are taken to lie in memory or on a disk of its own."""
    return 0.0 if plan.side else plan.batch * plan.processes * plan.image_bytes / plan.disk


def simulated_epoch(plan: Plan, *, asked: bool, steps: int = 2000, queue: int = 4, seed: int = 0) -> float:
    """Seconds of an epoch of which ``steps`` are stepped through; failures come at their rate on top."""
    draw = random.Random(seed)
    compute = plan.batch * (1 / plan.student_rate + asked / plan.teacher_rate)
    exchange, reading = exchange_seconds(plan), reading_seconds(plan)
    steps = min(steps, plan.steps)
    ready: list[float] = []  # when each step's images are there, on the slowest machine
    done: list[float] = []  # when each step is over
    for step in range(steps):
        free = max(ready[-1] if ready else 0.0, done[step - queue] if step >= queue else 0.0)
        ready.append(free + reading)
        slowest = max(jittered(draw, compute, plan.jitter) for _ in range(int(plan.workers)))
        done.append(max(ready[step], done[-1] if done else 0.0) + slowest + exchange)
    seconds = done[-1] * plan.steps / steps
    lost = plan.checkpoint / 2 + plan.restart
    return seconds * (1 + plan.machines / (plan.failures * 3600) * lost)


def jittered(draw: random.Random, seconds: float, sigma: float) -> float:
    """A time whose mean is ``seconds``."""
    return seconds * draw.lognormvariate(-(sigma**2) / 2, sigma)


def simulated(plan: Plan) -> tuple[float, float]:
    """Hours with the live teacher, and with stored answers."""
    student, teacher = (simulated_epoch(plan, asked=asked) for asked in (False, True))
    asked = min(plan.views, plan.epochs)
    live = plan.epochs * (student + (plan.students - 1) * teacher)
    return live / 3600, (plan.epochs * plan.students * student + asked * (teacher - student)) / 3600


BILLION = Plan(images=1e9, epochs=4, views=1, record=72, side=0, machines=64)
SHOWN = {
    "ImageNet-1k, 1 machine": Plan(),
    "ImageNet-1k, 4 machines": Plan(machines=4),
    "ImageNet-1k, 1 machine, files": Plan(side=0),
    "1e9 images, 64 machines": BILLION,
    "1e9 images, 64 machines, all logits": replace(BILLION, record=2000),
    "1e9 images, 512 machines": replace(BILLION, machines=512),
}


def row(name: str, plan: Plan) -> str:
    """A line of the table."""
    paper, (live, stored) = on_paper(plan), simulated(plan)
    cells = [f"{paper.live:,.1f} h", f"{live:,.1f} h", f"{paper.stored:,.1f} h", f"{stored:,.1f} h"]
    cells += [
        format_scaled(paper.store, "B"),
        format_scaled(paper.pixels, "B"),
        format_scaled(paper.reading, "B"),
        format_scaled(paper.sending, "B"),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


SAMPLES = 16  # different images, of which the files are copies


def make_files(root: Path, files: int, classes: int, size: int) -> None:
    """Write JPEG files of ``size`` pixels in class folders, at least ten to a class."""
    import numpy as np
    from PIL import Image

    draw, contents = np.random.default_rng(0), []
    for number in range(SAMPLES):
        path = root / f"sample{number}.jpg"
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
        contents.append(path.read_bytes())
        path.unlink()
    for number in range(max(files, 10 * classes)):
        folder = root / f"class{number % classes:05d}"
        folder.mkdir(exist_ok=True)
        # Bytes behind the image: as of photographs, no two files are equal.
        (folder / f"{number:07d}.jpg").write_bytes(contents[number % SAMPLES] + number.to_bytes(8, "little"))


def measure_start(root: Path, size: int) -> dict[str, float]:
    """Check and decode the images of a folder; return seconds of CPU, and peak memory in bytes."""
    from potstill.data.datasets import load_data
    from potstill.data.decoded_cache import StagedSquares
    from potstill.data.loader import Loader
    from potstill.data.preprocessing import decoded_square
    from potstill.data.settings import DataSettings
    from potstill.data.splits import SPLITS
    from potstill.input_spec import InputSpec

    spec, began = InputSpec(size), time.process_time()
    staged = StagedSquares({split: {decoded_square(spec)} for split in SPLITS}, 0.3)
    data = load_data(DataSettings(source=str(root)), staged=staged)
    checked = time.process_time()
    for split in reversed(SPLITS):
        identity = f"{data.fingerprint}/{split}"
        loader = Loader(data.split(split), spec, batch_size=64, order="shuffled", identity=identity)
    next(iter(loader.epoch(0)))
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"check": checked - began, "batch": time.process_time() - checked, "memory": memory}


def measured_row(files: int, classes: int, size: int) -> str:
    """Measure one row of the table."""
    with tempfile.TemporaryDirectory() as name:
        root, cache = Path(name, "images"), Path(name, "cache")
        root.mkdir()
        make_files(root, files, classes, size)
        time.sleep(2.1)  # files that have just changed are not trusted to stay as they are
        environment = os.environ | {"POTSTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

        def output(*arguments: object) -> str:
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

        starts = [json.loads(output("-m", "benchmarks.scale", "start", root, size)) for _ in range(2)]
        disk = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
        files = max(files, 10 * classes)
        end = output(Path(__file__).parent / "run_end.py", "--images", files, "--classes", classes)
    found = re.search(r"in all ([0-9.]+) CPU-s .* peak (\d+) MB, (\d+) MB on disk", end)
    assert found is not None
    cells = [f"{files:,}", f"{classes:,}", str(size)]
    cells += [f"{each['check']:.1f} + {each['batch']:.1f}" for each in starts]
    cells += [format_scaled(starts[0]["memory"], "B"), format_scaled(disk, "B")]
    return "| " + " | ".join([*cells, found[1], f"{found[2]} MB", f"{found[3]} MB"]) + " |"


def measure(arguments: list[str]) -> None:
    """Print the table of measured costs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale measure")
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 100])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32])
    given = parser.parse_args(arguments)
    print("| files | classes | px | check + packing, CPU-s | again | memory | caches | end, CPU-s | memory | files |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in given.sizes:
        for files in given.files:
            for classes in given.classes:
                print(measured_row(files, classes, size), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["measure"]:
        measure(arguments[1:])
        return
    if arguments[:1] == ["start"]:
        print(json.dumps(measure_start(Path(arguments[1]), int(arguments[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(Plan):
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", type=float, help=f"{each.metadata['help']} (default {each.default:g})"
        )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    print("| | live teacher, paper | simulated | stored, paper | simulated | store | pixels | read an epoch | sent |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, plan in ({"yours": Plan(**given)} if given else SHOWN).items():
        print(row(name, plan))


if __name__ == "__main__":
    main()
