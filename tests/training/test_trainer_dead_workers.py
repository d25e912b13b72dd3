"""A process that decodes images is killed, wherever the training is: one ``WorkerError``, and nothing is lost."""

import multiprocessing
import os
import signal
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch
from torch import nn

from potstill import io
from potstill.data import workers
from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.distillation.distiller import Distiller
from potstill.errors import WorkerError
from potstill.input_spec import InputSpec
from potstill.methods import create_method
from potstill.training import checkpointing
from potstill.training.callbacks import SilentObserver
from potstill.training.checkpointing import load_checkpoint
from potstill.training.devices import Compute
from potstill.training.optim import GradientAccumulator
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer

pytestmark = pytest.mark.own_process

IMAGES, CLASSES, EPOCHS = 18, 3, 3
DECODED = EPOCHS * 2 * IMAGES  # train and val


def training(folder):
    random = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    images = ArraySet(random.integers(0, 255, (IMAGES, 4, 4, 3), dtype=np.uint8), labels, list(map(str, labels)))
    spec = InputSpec(size=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    loaders = [
        Loader(images, spec, batch_size=6, order=order, workers=2, cache_fraction=1e-15)
        for order in ("shuffled", "listed")
    ]
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return Trainer(
        Distiller(student, None, create_method("supervised")),
        *loaders,
        # a checkpoint after every step
        TrainingSettings(epochs=EPOCHS, batch_size=6, optimizer="sgd", lr=0.1, checkpoint_seconds=1e-9),
        Compute(torch.device("cpu"), bf16=False, channels_last=False),
        folder=folder,
        observer=SilentObserver(),
        classes=CLASSES,
    )


def weights(trained):
    return [parameter.tolist() for parameter in trained.distiller.student.parameters()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trained = training(tmp_path_factory.mktemp("undisturbed"))
    trained.run()
    return weights(trained)


def check_goes_on(folder, undisturbed):
    """Each checkpoint that is there is whole, and a training that goes on from it ends with the same weights."""
    assert not list(folder.rglob("*.part"))
    for path in folder.rglob("*.checkpoint"):
        load_checkpoint(path)
    again = training(folder)
    again.run(resume=True)
    assert weights(again) == undisturbed


# where the main thread is: what it enters then, and how often it has done so before
PLACES = {
    "forward": (Distiller, "forward", 4),
    "backward": (GradientAccumulator, "add", 3),
    "in a backward hook": (nn.Tanh, "backward hook", 2),
    "optimizer": (torch.optim.SGD, "step hook", 3),
    "gathering a checkpoint": (checkpointing, "pack_optimizer", 2),
    "writing a checkpoint": (io.os, "fsync", 5),
    "replacing a checkpoint": (io.os, "replace", 7),
    "validation": (Trainer, "_evaluate", 0),
    "within validation": (Distiller, "eval", 1),
    "figures": (Trainer, "_record_metrics", 1),
    "keeping the best weights": (checkpointing.Checkpointer, "keep_best", 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_the_main_thread_is_anywhere(tmp_path, monkeypatch, undisturbed, place):
    owner, name, times = PLACES[place]
    trained, calls, killed, alive = training(tmp_path), [], [], []

    def kill(*_):
        calls.append(1)
        if len(calls) == times + 1:
            for child in multiprocessing.active_children():
                child.kill()
                assert wait([child.sentinel], 60)
                killed.append(child.name)
            alive.append(True)  # nothing was raised here

    with monkeypatch.context() as patched:
        if name == "backward hook":
            trained.distiller.student[2].register_full_backward_hook(kill)
        elif name == "step hook":
            trained.optimizer.register_step_pre_hook(kill)
        else:
            original = getattr(owner, name)

            def enter(*arguments, **options):
                kill()
                return original(*arguments, **options)

            patched.setattr(owner, name, enter)
        with pytest.raises(WorkerError, match=r"has died; (.|\n)*ended by SIGKILL"):
            trained.run()
    assert killed
    assert alive
    check_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("image", range(1, DECODED + 1, 9))
def test_killed_at_any_image(tmp_path, monkeypatch, undisturbed, image):
    count, fit = multiprocessing.Value("i", 0), workers.read_square

    def fit_or_die(*arguments):
        with count.get_lock():
            count.value += 1
            last = count.value == image
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return fit(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "read_square", fit_or_die)
        with pytest.raises(WorkerError, match="has died; the next images were "):
            training(tmp_path).run()
    check_goes_on(tmp_path, undisturbed)
