"""A real GPU against the CPU: losses and gradients of every method, views, half precision, resuming, compiling, memory.

Without a GPU these are skipped.  ``POTSTILL_GPU_TESTS=cpu pytest -m gpu tests/gpu`` runs them on the CPU in its place,
which shows that the tests themselves work.
"""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.distillation.distiller import Distiller
from potstill.errors import Stopped, StorageError
from potstill.input_spec import InputSpec
from potstill.methods import create_method, list_own_methods
from potstill.methods.kd import KD
from potstill.models.factory import create_model
from potstill.training.autotune import BatchTrial
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute, create_compute
from potstill.training.settings import TrainingSettings
from potstill.training.student_forward import StudentCompiler
from potstill.training.trainer import Trainer
from potstill.types import Batch

from ..methods.test_contract import IMAGES, INDEX, LABELS, OPTIONS, SECOND, B, K, listed, networks

DEVICE = torch.device(os.environ.get("POTSTILL_GPU_TESTS", "cuda"))
CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is false here"
)
pytestmark = [pytest.mark.gpu, *([NEEDS_CUDA] if DEVICE.type == "cuda" else [])]


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32, whose ten bits would hide differences."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, benchmark=False, deterministic=True):
        yield
    torch.set_float32_matmul_precision(before)


def first_step(name, device, seed=0):
    """Logits, terms and gradients of a method's first step, on the CPU."""
    torch.manual_seed(0)
    student, teacher = networks(name)
    for module in (*student.modules(), *teacher.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks differ between devices
    images, labels, index, second = (each.to(device) for each in (IMAGES, LABELS, INDEX, SECOND))
    distiller = Distiller(
        student.to(device),
        listed(teacher.to(device)),
        create_method(name, **OPTIONS.get(name, {})),
        example=images,
        train_labels=LABELS,
        batch_size=B,
    )
    distiller.prepare(lambda: iter([Batch(images, labels, index)]))
    distiller.start_epoch(0, 40)
    torch.manual_seed(seed)
    step = distiller(images, labels, index=index, view=torch.zeros_like(index), second=second)
    step.loss.backward()
    gradients = {name: each.grad.cpu() for name, each in distiller.named_parameters() if each.grad is not None}
    return step.logits.detach().cpu(), {key: term.item() for key, term in step.terms.items()}, gradients


@pytest.mark.parametrize("name", list_own_methods())
def test_every_method_gives_the_losses_and_gradients_of_the_cpu(name):
    logits, terms, gradients = first_step(name, CPU)
    found_logits, found_terms, found_gradients = first_step(name, DEVICE)
    assert found_logits.shape == (B, K)
    torch.testing.assert_close(found_logits, logits, rtol=1e-3, atol=1e-4)
    assert found_terms.keys() == terms.keys()
    assert found_gradients.keys() == gradients.keys()
    if first_step(name, CPU, seed=1)[1] != terms:  # it draws random numbers, which differ between devices
        assert all(np.isfinite(value) for value in found_terms.values())
        return
    assert found_terms == pytest.approx(terms, rel=1e-3, abs=1e-5)
    for path, gradient in gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found_gradients[path], gradient, rtol=1e-2, atol=1e-2 * largest + 1e-6, msg=path)


AUGMENTATIONS = {
    "shifts": AugmentSettings(pad_crop=0.1, hflip=True, vflip=True, rotate90=True),
    "crops": AugmentSettings(crop_scale=(0.2, 1.0), hflip=True),
    "colours": AugmentSettings(color_jitter=0.4, erasing=0.5),
    "mixing": AugmentSettings(mixup=0.4, cutmix=1.0, hflip=True),
}


def loader(device, augment, batch_size=8, count=32, size=24):
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = random.integers(0, 128, (count, size + 8, size + 8, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 60
    images = ArraySet(pixels, labels, [f"{i}" for i in range(count)])
    return Loader(
        images, InputSpec(size), batch_size=batch_size, augment=augment, order="shuffled", classes=3, device=device
    )


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_are_those_of_the_cpu_to_the_bit(name):
    augment = AUGMENTATIONS[name]
    for one, other in zip(loader(CPU, augment).epoch(1), loader(DEVICE, augment).epoch(1), strict=True):
        assert other.images.device.type == DEVICE.type
        assert torch.equal(one.images, other.images.cpu())
        assert torch.equal(one.labels, other.labels.cpu())


def training(folder, settings, device=DEVICE, compute=None):
    torch.manual_seed(0)
    student, teacher = (create_model(name, 3, size=24).to(device) for name in ("cifar/resnet8", "cifar/resnet20"))
    compute = compute or create_compute(settings)
    return Trainer(
        Distiller(student, teacher, KD()),
        loader(device, AUGMENTATIONS["shifts"]),
        loader(device, None),
        settings,
        compute,
        folder=folder,
        observer=SilentObserver(),
        classes=3,
    )


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_student_learns_in_every_precision(tmp_path, precision):
    settings = TrainingSettings(
        epochs=4, lr=0.01, batch_size=8, precision=precision, device=str(DEVICE), ema_decay=0.9, max_grad_norm=5.0
    )
    history = training(tmp_path, settings).run()
    losses = [record["train"]["loss"] for record in history.records]
    assert losses[-1] < losses[0]
    assert history.best_value > 0.4  # of three classes


class Stopping(SilentObserver):
    """Stops a training after so many of its steps, as a signal does."""

    def __init__(self, training, after):
        self.training, self.left = training, after

    def step(self, images):
        self.left -= 1
        if self.left == 0:
            self.training.signals.requested = signal.SIGTERM


@pytest.mark.parametrize("after", [6, 8])  # within an epoch of four steps, and after its last step
@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, precision, after):
    settings = TrainingSettings(
        epochs=3, lr=0.01, batch_size=8, precision=precision, device=str(DEVICE), checkpoint_seconds=0, ema_decay=0.9
    )
    whole = training(tmp_path / "whole", settings)
    whole.run()
    cut = training(tmp_path / "cut", settings)
    cut.observer = Stopping(cut, after)
    with pytest.raises(Stopped):
        cut.run()
    again = training(tmp_path / "cut", settings)
    again.run(resume=True)
    for one, other in zip(whole.distiller.student.parameters(), again.distiller.student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(whole.history.records, again.history.records, strict=True):
        assert one["train"]["loss"] == pytest.approx(other["train"]["loss"], rel=1e-3)


@NEEDS_CUDA
@pytest.mark.parametrize("batch", [8, 160])  # with CUDA graphs, and without
def test_a_compiled_student_gives_the_same_loss(batch):
    settings = TrainingSettings(compile=True, batch_size=batch, precision="float32")
    compute = create_compute(settings)
    torch.manual_seed(0)
    student = create_model("cifar/resnet8", 3, size=24).to(DEVICE).to(memory_format=compute.memory_format)
    distiller = Distiller(student, None, create_method("supervised"))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    compiler = StudentCompiler(distiller, optimizer, settings, compute, SilentObserver())
    images = torch.randn(batch, 3, 24, 24, device=DEVICE).contiguous(memory_format=compute.memory_format)
    labels = torch.arange(batch, device=DEVICE) % 3
    expected = distiller(images, labels).loss.item()
    with compiler.epoch(1, 10**9):
        compiler.prepare(images)
        assert compiler.compiled_forward is not None
        assert distiller(images, labels).loss.item() == pytest.approx(expected, rel=1e-3)


@NEEDS_CUDA
def test_too_little_memory_is_found_with_the_batch_that_fits():
    student = create_model("resnet18", 3, size=64).to(DEVICE)
    distiller = Distiller(student, None, create_method("supervised"))
    count = 512
    batch = Batch(torch.zeros(count, 3, 64, 64, device=DEVICE), torch.arange(count, device=DEVICE) % 3)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    allowed = torch.cuda.memory_allocated(DEVICE) + 600 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total, torch.cuda.current_device())
    try:
        compute = Compute(DEVICE, bf16=False, channels_last=False)
        with pytest.raises(StorageError, match=r"out of memory at batch 512, in the .* pass: \d+ fits"):
            BatchTrial(distiller, batch, compute, stage="baseline", state_bytes=0).run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())


@NEEDS_CUDA
def test_pixels_that_stay_on_the_cpu_are_read_ahead():
    augment = AUGMENTATIONS["shifts"]
    resident, ahead = loader(DEVICE, augment), loader(DEVICE, augment)
    ahead._pixels = ahead._pixels.cpu()
    for one, other in zip(resident.epoch(0), ahead.epoch(0), strict=True):
        assert torch.equal(one.images, other.images)
