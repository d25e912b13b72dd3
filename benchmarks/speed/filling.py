"""(d) Bytes on disk for each view of a sample; (g) views per second that the teacher answers while a store is filled,
by those of the same teacher on a batch in memory: goal 0.95.

(d) counts the records and their checksums, and besides all blocks of the file system, the manifest's among them.
(g) counts input pipeline, record and the last flush to disk on the side of the store, and nothing but the teacher on
the other.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.speed.clock import table, take_turns
from benchmarks.speed.ours import Ours, teacher_precision
from benchmarks.speed.scene import add_arguments, make_scene, workplace

from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat, RecordKind

SIZES: tuple[tuple[int, RecordKind], ...] = (
    (4, "float16"),
    (64, "float16"),
    (100, "float16"),
    (100, "top16"),
    (1000, "top16"),
)


def main(arguments: list[str]) -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, images=512)
    parser.add_argument("--samples", type=int, default=50_000, help="of the stores whose size is measured")
    given = parser.parse_args(arguments)
    with workplace() as folder:
        print(bytes_per_view(given.samples, folder))
        print(fill_rate(given, folder))


def bytes_per_view(samples: int, folder: Path) -> str:
    """(d) for some numbers of classes."""
    rows = []
    for classes, kind in SIZES:
        record, views = RecordFormat(kind, classes), 2
        store = TeacherCache.open(folder / "sizes", {"classes": classes, "kind": kind}, record, samples, {})
        logits = np.random.default_rng(0).normal(size=(samples, classes)).astype(np.float32)
        for view in range(views):
            store.write(view, np.arange(samples), record.encode(logits))
        store.close()
        size = sum(path.stat().st_size for path in store.path.iterdir() if path.suffix == ".bin")
        goal = 2 * classes + 2 if classes <= 64 else 76 if kind == "top16" else None
        blocks = sum(path.stat().st_blocks * 512 for path in store.path.iterdir())
        per_record, everything = (f"{each / samples / views:.2f}" for each in (size, blocks))
        rows.append((f"{classes} classes, {kind}", per_record, "" if goal is None else f"<= {goal}", everything))
    return f"(d) {samples:,} samples\n" + table(("record", "bytes", "goal", "with all blocks"), rows) + "\n"


def fill_rate(given: argparse.Namespace, folder: Path) -> str:
    """(g)."""
    scene = make_scene(given, folder)
    ours, numbers = Ours(scene, folder, "cold"), itertools.count()
    teachers, recorded = ours.distiller.teacher, ours.recorded
    assert teachers is not None
    assert recorded is not None
    kept = next(iter(ours.loader.epoch(0))).images.contiguous(memory_format=ours.compute.memory_format)

    def resident() -> None:
        for ids in ours.loader.epochs.batches(0):
            with ours.compute.autocast():
                teachers.run(kept[: len(ids)])

    def filling() -> None:
        number = next(numbers)
        recorded.start_epoch(number)
        for batch in ours.loader.epoch(number):
            recorded(replace(batch, images=batch.images.contiguous(memory_format=ours.compute.memory_format)))
        recorded.flush()

    result = take_turns({"resident": resident, "filling": filling}, given.rounds)
    if ours.asked != ours.loader.count * (given.rounds + 1):  # else old records were read
        raise RuntimeError(f"the teacher was asked of {ours.asked} images")
    middle, least, most = result.ratio("resident", "filling")
    speed = f"{ours.loader.count / result.median('filling'):.0f} views/s"
    how = teacher_precision(ours.distiller) or "the precision of autocast"
    lines = [
        f"(g) teacher runs in {how}{result.mark}",
        f"filling / resident {middle:.3f}  ({least:.3f} to {most:.3f})  goal >= 0.95  {speed}",
    ]
    return "\n".join(lines)
