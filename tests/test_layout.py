"""The size of the source, and how many of its files an everyday operation passes through.

The bounds are what the source keeps today; they are lowered with it, and never raised without a reason.
"""

import contextlib
import os
import runpy
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import potstill
from potstill.data.datasets import load_data
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.input_spec import InputSpec
from potstill.methods.kd import KD
from potstill.models.factory import create_model
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import create_compute
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer

SOURCE = os.path.dirname(potstill.__file__) + os.sep
SIZE, BATCH = 16, 8


@pytest.fixture(scope="module")
def counts():
    return runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "layout_counts.py"))


def test_the_number_of_modules(counts):
    assert len(counts["modules"]()) <= 250


def test_the_number_of_modules_with_one_importer(counts):
    assert len(counts["with_one_importer"]()) <= 42


class Trace:
    """The files of the source in which a function was called while ``recording``, in any thread."""

    def __init__(self):
        self.recording, self.files = False, set()

    def __call__(self, frame, event, arg):
        if self.recording and event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            self.files.add(frame.f_code.co_filename.removeprefix(SOURCE))

    @contextlib.contextmanager
    def installed(self, recording=True):
        before = sys.getprofile()
        self.recording = recording
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(before)
            threading.setprofile(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(20):
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def data(folder):
    return load_data(DataSettings(source=str(folder)))


def train_loader(data, kind=Loader):
    return kind(
        data.train,
        InputSpec(SIZE),
        batch_size=BATCH,
        augment=AugmentSettings(hflip=True, pad_crop=0.1),
        order="shuffled",
        views=2,
        classes=2,
    )


def cached_outputs(distiller, loader, folder):
    record = RecordFormat("float16", 2, 0)
    cache = TeacherCache.open(folder, {"name": "teacher"}, record, loader.samples, {})
    return CachedTeacherOutputs(distiller, loader, [cache], autocast=contextlib.nullcontext, warn=pytest.fail)


def kd_distiller():
    networks = [create_model("cifar/resnet8", 2, size=SIZE) for _ in range(2)]
    return Distiller(*networks, KD())


def fill_cache(outputs, loader):
    for epoch in (0, 1):  # both views
        outputs.start_epoch(epoch)
        for batch in loader.epoch(epoch):
            outputs(batch)
        outputs.flush()


def test_loading_a_folder(folder):
    trace = Trace()
    with trace.installed():
        load_data(DataSettings(source=str(folder)))
    assert "data/datasets.py" in trace.files
    assert len(trace.files) <= 11, sorted(trace.files)


def test_building_a_batch(data):
    trace, epoch = Trace(), train_loader(data).epoch(0)
    next(epoch)
    with trace.installed():
        next(epoch)
    assert "data/loader.py" in trace.files
    assert len(trace.files) <= 4, sorted(trace.files)


def test_reading_a_cached_answer(data, tmp_path):
    trace, loader = Trace(), train_loader(data)
    outputs = cached_outputs(kd_distiller(), loader, tmp_path)
    fill_cache(outputs, loader)
    outputs.start_epoch(2)
    batches = loader.epoch(2)
    outputs(next(batches))
    batch = next(batches)
    with trace.installed():
        outputs(batch)
    assert outputs.counts.read == 2 * BATCH
    assert "distillation/teacher_cache/cache.py" in trace.files
    assert len(trace.files) <= 5, sorted(trace.files)


def test_a_training_step_with_cached_answers(data, tmp_path):
    """From the batch to the weights' update, without the first step of an epoch."""
    trace, steps = Trace(), 0

    class TracedLoader(Loader):
        """Records what happens between its batches."""

        def epoch(self, *arguments):
            for position, batch in enumerate(super().epoch(*arguments)):
                trace.recording = position > 0
                yield batch
                trace.recording = False

    class Steps(SilentObserver):
        def step(self, images):
            nonlocal steps
            steps += 1

    loader = train_loader(data, TracedLoader)
    distiller = kd_distiller()
    outputs = cached_outputs(distiller, loader, tmp_path / "cache")
    fill_cache(outputs, loader)
    trace.files.clear()
    settings = TrainingSettings(epochs=1, batch_size=BATCH)
    trainer = Trainer(
        distiller,
        loader,
        Loader(data.val, InputSpec(SIZE), batch_size=BATCH),
        settings,
        create_compute(settings),
        folder=tmp_path / "run",
        observer=Steps(),
        classes=2,
        teacher_outputs={"train": outputs},
    )
    with trace.installed(recording=False):
        trainer.run()
    assert steps == loader.steps > 2
    assert {"training/trainer.py", "methods/kd.py"} <= trace.files
    network = {"models/cifar.py"}
    assert len(trace.files - network) <= 18, sorted(trace.files)
