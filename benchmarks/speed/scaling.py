"""Time and memory against the number of images, classes, stored views and teachers.

Images are made in a memory-mapped file, so that 60,000 of them cost no more memory than 1,000; the networks are small,
so that what is measured is everything around them.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks.speed.clock import table

ONE = "--one"


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
        print(*point(*given.one))
        return
    base = (given.images[0], given.classes[0], given.views[0], given.teachers[0])
    rows = []
    for at, (what, values) in enumerate(
        (("images", given.images), ("classes", given.classes), ("views", given.views), ("teachers", given.teachers))
    ):
        for value in values:
            chosen = [*base[:at], value, *base[at + 1 :]]
            out = subprocess.run(
                [sys.executable, "-m", "benchmarks.speed", "scaling", ONE, *map(str, chosen)],
                capture_output=True,
                text=True,
                check=False,
            )
            if out.returncode:
                sys.exit(out.stderr[-2000:])
            asked, read, memory = map(float, out.stdout.split())
            rows.append((f"{what} {value:,}", f"{1e6 * asked:.0f}", f"{1e6 * read:.0f}", f"{memory:.0f}"))
    print(table(("", "asking, us/image", "reading, us/image", "peak MiB"), rows))


def point(images: int, classes: int, views: int, teachers: int) -> tuple[float, float, float]:
    """(seconds per image while recording, while reading, peak MiB of memory) of a small distilling loop."""
    import contextlib

    import torch

    from potstill.data.images import ArraySet
    from potstill.data.loader import Loader
    from potstill.data.settings import AugmentSettings
    from potstill.distiller import Distiller
    from potstill.inputs import InputSpec
    from potstill.methods.kd import KD
    from potstill.models.create import create_model
    from potstill.store.recorded import Recorded
    from potstill.store.records import Record
    from potstill.store.shelf import Store

    torch.set_num_threads(1)

    def fail(message: str) -> None:
        raise RuntimeError(message)

    with tempfile.TemporaryDirectory() as folder:
        pixels = np.lib.format.open_memmap(f"{folder}/pixels.npy", mode="w+", dtype=np.uint8, shape=(images, 32, 32, 3))
        random = np.random.default_rng(0)
        for start in range(0, images, 1000):
            chunk = pixels[start : start + 1000]
            chunk[:] = random.integers(0, 256, chunk.shape, dtype=np.uint8)
        labels = np.arange(images) % classes
        found = ArraySet(pixels, labels, [f"{i}" for i in range(images)])
        loader = Loader(
            found,
            InputSpec(32),
            batch_size=100,
            augment=AugmentSettings(hflip=True),
            order="shuffled",
            views=views,
            identity=f"{images} {classes}",
        )
        networks = [create_model("cifar/resnet8", classes, size=32).eval() for _ in range(teachers)]
        distiller = Distiller(create_model("cifar/resnet8", classes, size=32), networks, KD())
        stores = [
            Store.open(Path(folder), {"teacher": at}, Record("float16", classes), images, {}) for at in range(teachers)
        ]
        recorded = Recorded(distiller, loader, stores, autocast=contextlib.nullcontext, warn=fail)

        def epoch(number: int) -> float:
            started = time.perf_counter()
            recorded.start_epoch(number)
            for batch in loader.epoch(number):
                recorded(batch)
            recorded.flush()
            return (time.perf_counter() - started) / images

        asked = min(_each(epoch, range(views)))
        read = min(_each(epoch, range(views, 2 * views)))
        recorded.close()
    return asked, read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _each(call: Callable[[int], float], numbers: range) -> list[float]:
    return [call(number) for number in numbers]
