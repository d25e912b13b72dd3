"""Images at a teacher's own size: whichever batches are asked for, and however they are decoded."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.distillation.teachers import TeacherViews
from potstill.input_spec import InputSpec
from potstill.methods.kd import KD
from potstill.training.trainer import CachedTeacher, LiveTeacher

COUNT, CLASSES = 22, 3
STUDENT, TEACHER = InputSpec(8), InputSpec(12, (0.5,) * 3, (0.5,) * 3)


def loader(spec=STUDENT, order="shuffled", **options):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (COUNT, 20, 26, 3), dtype=np.uint8)
    images = ArraySet(pixels, np.arange(COUNT) % CLASSES, [f"{i}" for i in range(COUNT)])
    augment = AugmentSettings(crop_scale=(0.5, 1.0), hflip=True) if order == "shuffled" else None
    return Loader(images, spec, batch_size=4, augment=augment, order=order, views=2, classes=CLASSES, **options)


class Network(nn.Module):
    """Keeps what it is given; only images of one size fit."""

    def __init__(self, size):
        super().__init__()
        self.fc, self.seen = nn.Linear(3 * size * size, CLASSES), []

    def forward(self, images):
        self.seen.append(images)
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("options", [{}, {"workers": 2, "cache_fraction": 1e-9}], ids=["resident", "workers"])
@pytest.mark.parametrize("asked", [range(6), [0, 2, 3, 5], [4], [1, 2, 4, 5]], ids=str)
def test_any_batches_of_an_epoch(options, asked):
    student, own = loader(), loader(TEACHER, drawn_for=STUDENT, **options)
    views = TeacherViews([own, None, own])
    for epoch in (0, 3):
        views.start_epoch(epoch, 0)
        for position, batch in enumerate(student.epoch(epoch)):
            if position in asked:
                found = views.of(position, batch)
                assert found.images[1] is None
                assert torch.equal(found.images[0], own.view(batch.index, batch.view))
                assert found.images[2] is found.images[0]
                assert views.of(position, batch) is found  # the cached outputs of second images ask again


def test_a_step_in_the_midst_of_an_epoch():
    student, own = loader(), loader(TEACHER, drawn_for=STUDENT)
    views = TeacherViews([own])
    views.start_epoch(1, 3)
    for position, batch in enumerate(student.epoch(1, 3), start=3):
        assert torch.equal(views.of(position, batch).images[0], own.view(batch.index, batch.view))


def distiller():
    torch.manual_seed(0)
    return Distiller(Network(8), Network(12), KD(), student_input=STUDENT, teacher_input=TEACHER)


def test_live_and_cached_outputs_see_the_same_pixels(tmp_path):
    train, own = loader(), loader(TEACHER, drawn_for=STUDENT)
    ours, store = distiller(), TeacherCache.open(tmp_path, {}, RecordFormat("float32", CLASSES), COUNT, {})
    cached = CachedTeacherOutputs(
        ours, train, [store], autocast=contextlib.nullcontext, warn=pytest.fail, views=TeacherViews([own])
    )
    live = LiveTeacher(ours, TeacherViews([own]))
    for epoch in (0, 1, 2):
        for answers in (cached, live):
            answers.start_epoch(epoch)
        for batch in train.epoch(epoch):
            expected = ours.teacher.networks[0](own.view(batch.index, batch.view))
            said = [answers(batch).logits for answers in (cached, live)]
            assert torch.equal(said[0], expected)
            assert torch.equal(said[1], expected)
    assert cached.counts.computed == 2 * COUNT


def test_batches_that_are_there_already_are_not_decoded(tmp_path, monkeypatch):
    train, ours = loader(), distiller()
    store = TeacherCache.open(tmp_path, {}, RecordFormat("float32", CLASSES), COUNT, {})
    half = TeacherViews([loader(TEACHER, drawn_for=STUDENT)])
    cached = CachedTeacherOutputs(ours, train, [store], autocast=contextlib.nullcontext, warn=pytest.fail, views=half)
    cached.start_epoch(0)
    for batch in list(train.epoch(0))[:3]:
        cached(batch)
    own = loader(TEACHER, drawn_for=STUDENT)
    shown, view = [], own.view
    monkeypatch.setattr(own, "view", lambda index, number: shown.append(index.tolist()) or view(index, number))
    cached.views = TeacherViews([own])
    cached.start_epoch(0)
    said = []
    for position, batch in enumerate(train.epoch(0)):
        said.append(cached(batch))
        assert own.resident == (position > 3)  # not before two batches in a row are missing
    assert shown == [train.ids_of(0)[3].tolist()]
    for batch, found in zip(train.epoch(0), said, strict=True):
        assert torch.equal(found.logits, ours.teacher.networks[0](view(batch.index, batch.view)))


def test_val_asks_once_and_at_the_teachers_size():
    val, own, ours = loader(order="listed"), loader(TEACHER, order="listed", drawn_for=STUDENT), distiller()
    answers, network = CachedTeacher(ours, TeacherViews([own])), ours.teacher.networks[0]
    network.seen.clear()
    for _ in range(2):
        answers.start_epoch(0)
        for batch in val.epoch():
            assert torch.equal(answers(batch).logits, network.fc(own.view(batch.index, 0).flatten(1)))
    assert sum(map(len, network.seen)) == COUNT


def test_teachers_of_several_sizes():
    torch.manual_seed(0)
    networks, batch = [Network(12), Network(8)], next(loader().epoch())
    ours = Distiller(Network(8), networks, KD(), student_input=STUDENT, teacher_input=[TEACHER, STUDENT])
    views = TeacherViews([loader(TEACHER, drawn_for=STUDENT), None])
    views.start_epoch(0)
    found = ours.run_teacher(batch.images, teacher_images=views.of(0, batch))
    assert torch.equal(networks[1].seen[-1], batch.images)
    assert torch.equal(networks[0].seen[-1], views.of(0, batch).images[0])
    assert torch.allclose(found.logits, (found.members[0].logits + found.members[1].logits) / 2)
    ours.run_teacher(batch.images)  # without them it gets the student's, enlarged
    assert networks[0].seen[-1].shape[-1] == 12
    assert not torch.equal(networks[0].seen[-1], views.of(0, batch).images[0])
