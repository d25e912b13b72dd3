"""No step waits for a GPU: nothing is read back from it, and nothing is sent to it in a way that waits.

There need not be a GPU: torch's fake tensors say that they are on one, hold no numbers, and so refuse to be read.
Backward passes cannot be faked without one: that they read nothing back is seen on the CPU.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.distillation.distiller import Distiller, TermScaling
from potstill.evaluation.metrics import BUFFER_ROWS, StreamingMetrics, TermAverages
from potstill.input_spec import InputSpec
from potstill.methods import create_method, list_methods, method_info
from potstill.methods.at import AT
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.models.factory import create_model
from potstill.training.averaging import ModelEma
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute
from potstill.training.optim import GradientAccumulator
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer
from potstill.types import UNLABELED, Batch

pytestmark = pytest.mark.filterwarnings("ignore:the teacher of 40:UserWarning")

GPU = torch.device("cuda:0")
CLASSES, SIZE, IMAGES = 4, 32, 8


# What has to know values on the CPU: ``.item()``, and results whose shape depends on values.
READS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")} | {
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::bincount",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes what makes a program wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function.name()
        result = function(*arguments, **keywords)
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (arguments[0], result) if name == "aten::_to_copy" else (arguments[1], arguments[0])
            waits = not keywords.get("non_blocking", len(arguments) > 2 and arguments[2])
            if source.device.type != target.device.type and (waits or target.device.type == "cpu"):
                self.found.append(f"{name} {source.device} -> {target.device} {list(source.shape)}")
        elif name in READS:
            self.found.append(name)
        return result


def move(module):
    """Its parameters and buffers become fakes on a GPU."""
    moved = {}

    def fake(tensor):
        if id(tensor) not in moved:
            like = {"dtype": tensor.dtype, "device": GPU}
            moved[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), **like)
        return moved[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


class Watched(TermScaling):
    """Notes what waits while the factors are measured."""

    def forward(self, *arguments):
        with Waits() as waits:
            terms = super().forward(*arguments)
        self.found = waits.found
        return terms


class TwoHeads(nn.Module):
    """For methods that want a second head."""

    def __init__(self, network):
        super().__init__()
        width, network.head = network.head.in_features, nn.Identity()
        self.body, self.head, self.head_dist = network, nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)

    def forward(self, images):
        embedding = self.body(images)
        return (self.head(embedding) + self.head_dist(embedding)) / 2


def networks(method):
    student = create_model("cifar/resnet8", CLASSES, size=SIZE)
    if "head_dist" in method.student_taps:
        student = TwoHeads(student)
    teachers = [create_model("cifar/resnet8", CLASSES, size=SIZE) for _ in range(2 if method.needs.members else 1)]
    return student, teachers


def distil(method):
    """A Distiller past its first step (in which some methods look at their constants once), and a batch of zeros."""
    student, teachers = networks(method)
    labels = torch.arange(8 * CLASSES) % CLASSES
    images, index = torch.randn(IMAGES, 3, SIZE, SIZE), torch.arange(IMAGES)
    second = images.flip(0) if method.needs.second != "none" else None
    ours, theirs = InputSpec(SIZE, (0.5,) * 3, (0.2,) * 3), InputSpec(40, (0.4,) * 3, (0.3,) * 3)
    inputs = {"student_input": ours, "teacher_input": [theirs] * len(teachers)} if method.needs.teacher else {}
    distiller = Distiller(
        student, teachers, method, example=images[:2], train_labels=labels, batch_size=IMAGES, **inputs
    )
    distiller.prepare(lambda: iter([Batch(images, labels[:IMAGES], index)]))
    distiller.start_epoch(20, 240)
    extra = {"index": index, "view": torch.zeros_like(index), "second": second}
    batch = {"images": images, "labels": labels[:IMAGES], **extra}
    distiller(**batch)
    return distiller, batch


def made(name):
    return create_method(name, **method_info(name).examples, **({"paraphraser_epochs": 1} if name == "ft" else {}))


@pytest.mark.parametrize("name", list_methods())
def test_no_method_waits(name):
    distiller, batch = distil(made(name))
    # On the CPU, torch's one_hot looks at the labels: of the forward pass there, only auto scaling is watched.
    distiller.scaling = scaling = Watched()
    loss = distiller(**batch).loss
    with Waits() as waits:
        loss.backward()
    assert waits.found == []
    assert scaling.found == []
    distiller.scaling = None
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(distiller)
        batch = {key: None if value is None else torch.empty_like(value, device=GPU) for key, value in batch.items()}
        with Waits() as waits:
            loss = distiller(**batch).loss
    assert loss.device == GPU
    assert waits.found == []


class Numbers:
    """A loader on the GPU."""

    steps, count = 5, 5 * IMAGES

    def names_at(self, number, step):
        return ["a", "b"]

    def sizes_of(self, number):
        return [IMAGES] * self.steps

    def epoch(self, number=0, step=0):
        for _ in range(step, self.steps):
            index = torch.zeros(IMAGES, dtype=torch.int64, device=GPU)
            yield Batch(torch.empty(IMAGES, 3, SIZE, SIZE, device=GPU), index, index, index)
        raise Over  # what comes after the last step reads the epoch's figures


class Over(Exception):
    pass


# A method's losses are the same for each optimizer, so not every pair is tried.
@pytest.mark.parametrize(
    ("method", "optimizer"), [(Supervised, "adamw"), (KD, "adamw"), (AT, "adamw"), (KD, "dot"), (KD, "sgd")]
)
def test_no_step_of_the_loop_waits(tmp_path, monkeypatch, method, optimizer):
    distiller, _ = distil(method())
    loose = {"foreach": True} if optimizer == "sgd" else {}  # torch cannot fake its fused form
    settings = TrainingSettings(
        optimizer=optimizer,
        optimizer_options=loose,
        max_grad_norm=1.0,
        gradient_accumulation_steps=2,
        schedule="cosine",
        warmup_epochs=0.5,
    )
    average = ModelEma(distiller.student, 0.9)
    average.updates = 1  # the first update copies

    def backward(self, step, batches=1, share=1.0):
        assert (step.loss / batches).device == GPU
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(GradientAccumulator, "add", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(distiller)
        compute = Compute(GPU, bf16=False, channels_last=True)
        loop = Trainer(
            distiller,
            Numbers(),
            Numbers(),
            settings,
            compute,
            folder=tmp_path,
            observer=SilentObserver(),
            classes=CLASSES,
        )
        move(average.module)
        loop.average = average
        with Waits() as waits, pytest.raises(Over):
            loop._train_epoch(0, loop._new_epoch_state())
    assert waits.found == []
    assert average.updates == 1 + 3  # of five batches, two to an update


AUGMENTATIONS = {
    "mixing": AugmentSettings(mixup=0.4, cutmix=1.0, hflip=True, crop_scale=(0.3, 1.0)),
    "colours": AugmentSettings(color_jitter=0.4, erasing=0.5, pad_crop=0.1, rotate90=True),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_augmentation_waits_or_sends_masks(name):
    random = np.random.default_rng(0)
    squares = random.integers(0, 256, (IMAGES, SIZE + 8, SIZE + 8, 3), dtype=np.uint8)
    images = ArraySet(squares, np.arange(IMAGES) % CLASSES, [f"{i}" for i in range(IMAGES)])
    loader = Loader(images, InputSpec(SIZE), batch_size=4, augment=AUGMENTATIONS[name], classes=CLASSES)
    loader.device = loader.collator.device = GPU
    pixels = loader._pixels
    with FakeTensorMode(allow_non_fake_inputs=True):
        loader._pixels = torch.empty(pixels.shape, dtype=torch.uint8, device=GPU)
        loader.collator.every_label = torch.empty(IMAGES, dtype=torch.int64, device=GPU)
        batches = loader.epoch(0)
        next(batches)  # constants are sent once
        sent = []
        with Waits() as waits, Sent(sent):
            batch = next(batches)
    assert batch.images.device == GPU
    assert waits.found == []
    assert 0 < max(sent) < SIZE * SIZE  # numbers for an image, never a pixel's weight


class Sent(TorchDispatchMode):
    """Notes the size of what is copied to the GPU."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.name() == "aten::_to_copy" and arguments[0].device.type == "cpu" and result.device.type == "cuda":
            self.sizes.append(arguments[0].numel())
        return result


def test_metrics_wait_for_nothing_but_the_result():
    with FakeTensorMode():
        metrics, averages = StreamingMetrics(CLASSES, device=GPU), TermAverages()
        labels = torch.full((500,), UNLABELED, device=GPU)
        with Waits() as waits:
            for _ in range(3 * BUFFER_ROWS // 500):
                metrics.update(torch.empty(500, CLASSES, device=GPU, dtype=torch.bfloat16), labels)
                averages.update({"ce": torch.empty((), device=GPU), "kd": torch.empty((), device=GPU)}, 500)
        assert waits.found == []


def test_the_watch_sees_what_waits():
    with FakeTensorMode():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        for wait in (
            lambda: there.cpu(),
            lambda: there.to("cpu", non_blocking=True),  # whoever reads it has to wait
            lambda: here.to(GPU),
            lambda: there.copy_(here),
            lambda: torch.tensor([1.0, 2.0], device=GPU),
        ):
            with Waits() as waits:
                wait()
            assert len(waits.found) == 1
        with Waits() as waits:
            here.to(GPU, non_blocking=True)
            there.copy_(here, non_blocking=True)
        assert waits.found == []
        for wait in (lambda: there.sum().item(), lambda: bool(there.any()), lambda: float(there[0])):
            with pytest.raises(DataDependentOutputException):
                wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [Supervised, KD, AT])
def test_a_real_gpu_is_not_waited_for(tmp_path, method):
    distiller, _ = distil(method())
    distiller.cuda()
    compute = Compute(GPU, bf16=True, channels_last=True)
    loop = Trainer(
        distiller,
        Numbers(),
        Numbers(),
        TrainingSettings(),
        compute,
        folder=tmp_path,
        observer=SilentObserver(),
        classes=4,
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(Over):
            loop._train_epoch(0, loop._new_epoch_state())
    finally:
        torch.cuda.set_sync_debug_mode("default")
