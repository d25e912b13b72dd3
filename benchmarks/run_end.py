"""What the end of a run costs: evaluation, files and report of stages whose logits are made up.

    python benchmarks/run_end.py [--images 200000] [--classes 1000] [--stages 1] [--folder DIR]

Each split has that many images (train's probabilities are not kept, as by default).  Prints CPU seconds, the highest
resident memory and the bytes on disk, part by part.  No image is decoded and no network is run: what remains is the
work that grows with images and classes.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.evaluation.fidelity import agreement
from potstill.evaluation.final_metrics import calibration_report, split_intervals, split_metrics
from potstill.evaluation.predictions import MAX_VALUES_IN_MEMORY, Predictions, predict_split
from potstill.experiment.run_folder import SPLITS, RunFolder
from potstill.report.render import render
from potstill.types import Batch

BATCH = 256


class Logits(nn.Module):
    """Logits that follow from the number of the image: noise, and a peak at the label."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(4 * BATCH + classes, generator=random)
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        starts, labels = images[:, 0].long() * 37 % (4 * BATCH), images[:, 1].long()
        logits = self.noise.unfold(0, self.classes, 1)[starts].clone()
        return logits.scatter_add_(1, labels[:, None], torch.full((len(logits), 1), 6.0))


class Images:
    """Batches whose pixels are the number of the image and its label."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, self.labels = count, torch.arange(count) * classes // count

    def epoch(self) -> Iterator[Batch]:
        for index in torch.arange(self.count).split(BATCH):
            labels = self.labels[index]
            yield Batch(torch.stack([index, labels], dim=1).float(), labels, index=index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000, help="of each split")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--stages", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--folder", type=Path, help="where the run folder is made; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        _run(Path(root) / "run", given.images, given.classes, ("distilled", "teacher", "baseline")[: given.stages])


def _run(path: Path, count: int, classes: int, stages: tuple[str, ...]) -> None:
    clock = _Clock(path)
    names, class_names = [f"images/{i:08d}.jpg" for i in range(count)], [f"class {i}" for i in range(classes)]
    run, images = RunFolder(path), Images(count, classes)
    large = count * classes > MAX_VALUES_IN_MEMORY
    clock.lap("names of images and classes")
    entries: dict[str, Any] = {}
    teacher: Predictions | None = None
    for seed, stage in enumerate(sorted(stages, reverse=True)):
        found = {}
        for split in SPLITS:
            file = run.stage(stage) / f"log_probabilities_{split}.npy"
            kept = split != "train" or not large
            predictions = predict_split(
                Logits(classes, seed), images, classes=classes, file=file if kept and large else None
            )
            assert predictions is not None  # of a single process
            found[split] = predictions
            clock.lap(f"{stage}: predictions on {split}")
            run.write_confusion(stage, split, found[split], class_names)
            if kept:
                run.write_predictions(stage, split, names, found[split], class_names)
            if kept and large:
                run.add_file(f"{stage}/{file.name}")
            clock.lap(f"{stage}: files of {split}")
        metrics = {split: split_metrics(found[split], class_names) for split in SPLITS}
        run.write_metrics(stage, metrics)
        clock.lap(f"{stage}: metrics")
        intervals = split_intervals(found["test"])
        clock.lap(f"{stage}: intervals")
        val, test = found["val"], found["test"]
        assert val.probabilities is not None
        assert test.probabilities is not None
        scaled = calibration_report(val.probabilities, val.labels, test.probabilities, test.labels)
        clock.lap(f"{stage}: calibration")
        if teacher is not None and teacher.probabilities is not None:
            metrics["test"] |= agreement(test.probabilities, teacher.probabilities)
            clock.lap(f"{stage}: agreement with the teacher")
        teacher = test if stage == "teacher" else teacher
        flat = {split: {k: v for k, v in metrics[split].items() if k != "per_class"} for split in SPLITS}
        entries[stage] = {"model": {}, "training": None, **flat, "test_intervals": intervals, "calibration": scaled}
    data = {"class_names": class_names, "counts": {split: {} for split in SPLITS}}
    run.write_results({"schema": 1, "name": "run", "data": data, "stages": entries, "warnings": []})
    render(path)
    clock.lap("report")
    clock.total(len(stages))


class _Clock:
    def __init__(self, folder: Path) -> None:
        self.folder, self.before, self.start = folder, time.process_time(), time.process_time()

    def lap(self, what: str) -> None:
        now = time.process_time()
        print(f"{what:<42} {now - self.before:8.1f} CPU-s   peak {_peak():7.0f} MB", flush=True)
        self.before = now

    def total(self, stages: int) -> None:
        sizes = {
            each.relative_to(self.folder): each.stat().st_size for each in self.folder.rglob("*") if each.is_file()
        }
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
            print(f"  {name!s:<42} {size / 1e6:10.1f} MB")
        seconds = time.process_time() - self.start
        print(
            f"in all {seconds:.1f} CPU-s for {stages} stage(s), peak {_peak():.0f} MB, {sum(sizes.values()) / 1e6:.0f} MB on disk"  # noqa: E501
        )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="raise", under="ignore")
    main()
