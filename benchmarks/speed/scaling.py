"""Time and memory against the number of images, classes, stored views and teachers.

Images are made from their number when they are asked for, and decoded once into the cache, as files would be; the
networks are small, so that what is measured is everything around them.  Memory is what the process holds of its own:
pages of files that it maps, which the system may take back at any time, do not count.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed.clock import Watch, mark_of, table

ONE = "--one"
REPOSITORY = Path(__file__).parents[2]


def main(arguments: list[str]) -> None:
    """Each point in a process of its own, since memory is the process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 60_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 100, 1000])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(ONE, type=int, nargs=4, metavar="N", help="images, classes, views, teachers: a single point")
    given = parser.parse_args(arguments)
    if given.one:
        from benchmarks.speed.scene import workplace

        with workplace() as folder:
            print(*point(folder, *given.one))
        return
    watch, rows = Watch(), []
    for what, value, chosen in points(given):
        asked, read, disk, memory = _elsewhere(chosen)
        rows.append((f"{what} {value:,}", f"{1e6 * asked:.0f}", f"{1e6 * read:.0f}", f"{disk:.2f}", f"{memory:.0f}"))
    fixed = f"(where not said: {given.images[0]:,} images, {given.classes[0]} classes, {given.views[0]} views, "
    print(f"{fixed}{given.teachers[0]} teachers){mark_of(watch.others())}")
    print(table(("", "asking, us/image", "reading, us/image", "bytes/view", "memory, MiB"), rows))


def points(given: argparse.Namespace) -> list[tuple[str, int, list[int]]]:
    """(what varies, its value, images, classes, views and teachers); the others keep their first value."""
    varied = {name: getattr(given, name) for name in ("images", "classes", "views", "teachers")}
    base = {name: values[0] for name, values in varied.items()}
    return [(name, value, list((base | {name: value}).values())) for name in varied for value in varied[name]]


def _elsewhere(chosen: list[int]) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.speed", "scaling", ONE, *map(str, chosen)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    if out.returncode:
        sys.exit(out.stderr[-2000:])
    return [float(word) for word in out.stdout.split()]


def point(folder: Path, images: int, classes: int, views: int, teachers: int) -> tuple[float, float, float, float]:
    """(seconds per image while recording, while reading, bytes per view and teacher, MiB) of a small loop."""
    import contextlib

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from potstill.data import AugmentSettings
    from potstill.data.loader import Loader
    from potstill.distillation.cached_outputs import CachedTeacherOutputs
    from potstill.distillation.distiller import Distiller
    from potstill.distillation.teacher_cache.cache import TeacherCache
    from potstill.distillation.teacher_cache.record_format import RecordFormat
    from potstill.input_spec import InputSpec
    from potstill.methods.kd import KD
    from potstill.models.factory import create_model

    class Made:
        """Noise that depends on the image's number."""

        names, labels = [f"{i}" for i in range(images)], np.arange(images) % classes

        def __len__(self) -> int:
            return images

        def pixels(self, i: int) -> NDArray[np.uint8]:
            return np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def fail(message: str) -> None:
        raise RuntimeError(message)

    torch.set_num_threads(1)
    loader = Loader(
        Made(),
        InputSpec(32),
        batch_size=min(100, images),
        augment=AugmentSettings(hflip=True),
        order="shuffled",
        views=views,
        identity="made",
    )
    networks = [create_model("cifar/resnet8", classes, size=32).eval() for _ in range(teachers)]
    distiller = Distiller(create_model("cifar/resnet8", classes, size=32), networks, KD())
    record = RecordFormat("float16", classes)
    stores = [TeacherCache.open(folder / "stores", {"teacher": at}, record, images, {}) for at in range(teachers)]
    recorded = CachedTeacherOutputs(distiller, loader, stores, autocast=contextlib.nullcontext, warn=fail)

    def epoch(number: int) -> float:
        started = time.perf_counter()
        recorded.start_epoch(number)
        for batch in loader.epoch(number):
            recorded(batch)
        recorded.flush()
        return (time.perf_counter() - started) / images

    asked = min(epoch(number) for number in range(views))
    read = min(epoch(number) for number in range(views, 2 * views))
    if (recorded.counts.computed, recorded.counts.read) != (views * loader.count, views * loader.count):
        raise RuntimeError(f"the teachers were not asked once for each view: {recorded.counts}")
    memory = _own_memory()
    recorded.close()
    size = sum(path.stat().st_blocks * 512 for store in stores for path in store.path.iterdir())
    return asked, read, size / (images * views * teachers), memory


def _own_memory() -> float:
    """MiB of this process that belong to no file; its peak, files included, where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
