"""Potstill's own training loop on the scene: on labels alone, with the live teacher, and with stored answers."""

import itertools
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.speed.scene import ALPHA, LR, SCALE, TEMPERATURE, Scene

from potstill.data import AugmentSettings
from potstill.data.image_sets import FileSet, Subset
from potstill.data.loader import Loader
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.distillation.teacher_inference import Fidelity
from potstill.input_spec import InputSpec
from potstill.methods.base import Method
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute, create_compute
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer

Teaching = Literal["labels", "live", "cold", "warm"]

PIXELS = "benchmark"  # by which decoded pixels are found again
AUGMENT = AugmentSettings(crop_scale=SCALE, hflip=True)


def files(scene: Scene) -> FileSet:
    """All images of the scene."""
    found = sorted(scene.data.glob("*/*.jpg"))
    classes = {name: at for at, name in enumerate(sorted({path.parent.name for path in found}))}
    names = [path.relative_to(scene.data).as_posix() for path in found]
    return FileSet(scene.data, names, np.array([classes[path.parent.name] for path in found]))


def settings(scene: Scene, **changes: Any) -> TrainingSettings:
    """Those of the race; no checkpoint falls into a turn, since the peers write none."""
    given = {"epochs": 100_000, "batch_size": scene.batch, "optimizer": "adam", "lr": LR, "weight_decay": 0}
    return TrainingSettings(**given, checkpoint_seconds=1e9, **changes)


def loader(scene: Scene, *, views: int | None = None, identity: str | None = PIXELS, **options: Any) -> Loader:
    """Random resized crops and mirrors, as the peers draw them, from decoded pixels that are kept in the cache."""
    return Loader(
        files(scene),
        InputSpec(scene.size),
        batch_size=scene.batch,
        augment=AUGMENT,
        order="shuffled",
        views=views,
        identity=identity,
        **options,
    )


def fifth(scene: Scene) -> Loader:
    """Every fifth image as it is, for evaluation."""
    images = files(scene)
    some = Subset(images, range(0, len(images), 5))
    return Loader(some, InputSpec(scene.size), batch_size=scene.batch, identity=f"{PIXELS}, every fifth")


class Steps(SilentObserver):
    """Notes when each step is over."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def step(self, images: int) -> None:
        """One more."""
        self.at.append(time.perf_counter())


class Ours:
    """One contestant.

    Args:
        scene: of the race.
        folder: for checkpoints and stores.
        teaching: "labels": none; "live": the teacher at every step, nothing recorded; "cold": every view is new, asked
            and recorded; "warm": one view, recorded in the first turn.
        changes: other training settings.
    """

    def __init__(self, scene: Scene, folder: Path, teaching: Teaching, **changes: Any) -> None:
        given = settings(scene, **changes)
        self.scene, self.compute = scene, create_compute(given)
        self.loader = loader(scene, views=1 if teaching == "warm" else None)
        method: Method = Supervised() if teaching == "labels" else KD(temperature=TEMPERATURE, alpha=ALPHA)
        student, teacher = scene.student(), scene.teacher() if teaching != "labels" else None
        for network in (student, *([] if teacher is None else [teacher])):
            network.to(memory_format=self.compute.memory_format)
        self.distiller = Distiller(student, teacher, method)
        optimize_for_inference(self.distiller, self.loader, self.compute)
        self.recorded: CachedTeacherOutputs | None = None
        if teaching in ("cold", "warm"):
            self.store = TeacherCache.open(
                folder / "stores",
                {"teaching": teaching},
                RecordFormat("float16", scene.classes),
                self.loader.samples,
                {},
            )
            self.recorded = CachedTeacherOutputs(
                self.distiller, self.loader, [self.store], autocast=self.compute.autocast, warn=_fail
            )
        self.observer = Steps()
        self.training = Trainer(
            self.distiller,
            self.loader,
            fifth(scene),
            given,
            self.compute,
            folder=folder / teaching,
            observer=self.observer,
            classes=scene.classes,
            teacher_outputs={} if self.recorded is None else {"train": self.recorded},
        )
        self._numbers = itertools.count()

    def epoch(self) -> None:
        """Train for one epoch and read its figures, without evaluation."""
        under_way = self.training._new_epoch_state()
        self.training._train_epoch(next(self._numbers), under_way)
        under_way.metrics.compute()
        under_way.averages.compute("the benchmark")

    def whole_epoch(self) -> None:
        """The same with evaluation, and with what the loop writes."""
        self.training._epoch(next(self._numbers), self.training._new_epoch_state())

    @property
    def asked(self) -> int:
        """Images of which the teacher has been asked for the record."""
        return 0 if self.recorded is None else self.recorded.counts.computed

    def steps(self) -> list[float]:
        """Seconds of each step of such an epoch, its batch and its soft targets included."""
        self.observer.at = [time.perf_counter()]
        self.epoch()
        return [end - start for start, end in itertools.pairwise(self.observer.at)]


def teacher_precision(distiller: Distiller) -> str:
    """Return the precision and layout in which the teacher runs; empty if autocast decides."""
    return "; ".join(str(how) for how in getattr(distiller.teacher, "inference_settings", ()) if how is not None)


def optimize_for_inference(distiller: Distiller, batches: Loader, compute: Compute) -> None:
    """The teacher as a run asks it: converted weights, where the hardware is fast in them.

    Nothing is trained here, so the agreement says nothing and is not asked for.
    """
    if distiller.teacher is not None and compute.bf16:
        images, agreed = next(iter(batches.epoch(0))).images[:2], Fidelity(1.0, 0.0, 0)
        for at in range(len(distiller.teacher)):
            distiller.teacher.optimize_one_for_inference(
                at, torch.bfloat16, compute.memory_format, images, fidelity=agreed
            )


def _fail(message: str) -> None:
    raise RuntimeError(message)
