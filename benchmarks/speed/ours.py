"""Potstill's own training loop on the scene: on labels alone, with the live teacher, and with stored answers."""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.speed.scene import ALPHA, LR, SCALE, TEMPERATURE, Scene

from potstill.data.images import FileSet, ImageSet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.distiller import Distiller
from potstill.inputs import InputSpec
from potstill.methods.base import Method
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.store.recorded import Recorded
from potstill.store.records import Record
from potstill.store.shelf import Store
from potstill.training.devices import Compute, choose
from potstill.training.loop import Training
from potstill.training.observer import Silent
from potstill.training.settings import TrainingSettings

Teaching = Literal["labels", "live", "cold", "warm"]

AUGMENT = AugmentSettings(crop_scale=SCALE, hflip=True)


def files(scene: Scene) -> FileSet:
    """All images of the scene."""
    found = sorted(scene.data.glob("*/*.jpg"))
    classes = {name: at for at, name in enumerate(sorted({path.parent.name for path in found}))}
    names = [path.relative_to(scene.data).as_posix() for path in found]
    return FileSet(scene.data, names, np.array([classes[path.parent.name] for path in found]))


def settings(scene: Scene, **changes: Any) -> TrainingSettings:
    """Those of the race."""
    return TrainingSettings(epochs=100_000, batch_size=scene.batch, optimizer="adam", lr=LR, weight_decay=0, **changes)


def loader(scene: Scene, images: ImageSet, *, views: int | None, identity: str | None = None, **options: Any) -> Loader:
    """Random resized crops and mirrors, as the peers draw them."""
    return Loader(
        images,
        InputSpec(scene.size),
        batch_size=scene.batch,
        augment=AUGMENT,
        order="shuffled",
        views=views,
        identity=identity,
        **options,
    )


class Ours:
    """One contestant.

    Args:
        scene: of the race.
        folder: for checkpoints and stores.
        teaching: "labels": none; "live": the teacher at every step, nothing recorded; "cold": every view is new, asked
            and recorded; "warm": one view, recorded in the first turn.
        changes: other training settings.
    """

    def __init__(
        self, scene: Scene, folder: Path, teaching: Teaching, *, images: ImageSet | None = None, **changes: Any
    ) -> None:
        given = settings(scene, **changes)
        self.scene, self.compute = scene, choose(given)
        self.loader = loader(scene, images or files(scene), views=1 if teaching == "warm" else None)
        method: Method = Supervised() if teaching == "labels" else KD(temperature=TEMPERATURE, alpha=ALPHA)
        student, teacher = scene.student(), scene.teacher() if teaching != "labels" else None
        for network in (student, *([] if teacher is None else [teacher])):
            network.to(memory_format=self.compute.memory_format)
        self.distiller = Distiller(student, teacher, method)
        hasten(self.distiller, self.loader, self.compute)
        self.recorded: Recorded | None = None
        if teaching in ("cold", "warm"):
            self.store = Store.open(
                folder / "stores", {"teaching": teaching}, Record("float16", scene.classes), self.loader.samples, {}
            )
            self.recorded = Recorded(
                self.distiller, self.loader, [self.store], autocast=self.compute.autocast, warn=_fail
            )
        self.training = Training(
            self.distiller,
            self.loader,
            self.loader,
            given,
            self.compute,
            folder=folder / teaching,
            observer=Silent(),
            classes=scene.classes,
            answers={} if self.recorded is None else {"train": self.recorded},
        )
        self._numbers = itertools.count()

    def epoch(self) -> None:
        """Train for one epoch, without evaluation."""
        self.training._train_epoch(next(self._numbers))


def hasten(distiller: Distiller, batches: Loader, compute: Compute) -> None:
    """The teacher as a run asks it: converted weights, where the hardware is fast in them."""
    convert: Callable[..., object] | None = getattr(distiller.teacher, "hasten", None)
    if convert is not None and compute.bf16:
        with contextlib.suppress(StopIteration):
            images = next(iter(batches.epoch(0))).images
            convert(torch.bfloat16, compute.memory_format, images)


def _fail(message: str) -> None:
    raise RuntimeError(message)
