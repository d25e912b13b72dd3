"""What is trained on is what is kept; the teacher is asked once for each view; broken stores cost speed alone."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from potstill.data import AugmentSettings
from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.errors import StorageError
from potstill.input_spec import InputSpec
from potstill.methods.dist import DIST
from potstill.methods.kd import KD
from potstill.methods.mlld import MLLD
from potstill.methods.srrl import SRRL

COUNT, CLASSES, SIZE = 10, 3, 8


class Network(nn.Module):
    """Counts the images it is asked about."""

    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width, CLASSES)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.fc(self.body(images))


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    return ArraySet(pixels, np.arange(COUNT) % CLASSES, [f"{i}" for i in range(COUNT)])


def loader(images, views=2, **options):
    augment = AugmentSettings(hflip=True, pad_crop=0.25)
    return Loader(
        images,
        InputSpec(SIZE),
        batch_size=4,
        augment=augment,
        order="shuffled",
        views=views,
        classes=CLASSES,
        **options,
    )


def shelf(root, name="a", kind="float16", embedding=0, samples=COUNT):
    return TeacherCache.open(root, {"name": name}, RecordFormat(kind, CLASSES, embedding), samples, {})


def recorded(distiller, train, caches, second=(), warn=None):
    def fail(message):
        raise AssertionError(message)

    return CachedTeacherOutputs(
        distiller, train, caches, second, autocast=contextlib.nullcontext, warn=fail if warn is None else warn
    )


def outputs(answers, train, epoch):
    answers.start_epoch(epoch)
    found = [answers(batch) for batch in train.epoch(epoch)]
    answers.flush()
    return found


def test_the_teacher_is_asked_once_for_each_view_and_its_answers_are_what_it_said(images, tmp_path):
    teacher, train = Network(), loader(images, views=2)
    distiller = Distiller(Network(), teacher, KD())
    answers = recorded(distiller, train, [shelf(tmp_path)])
    before = teacher.seen
    first = outputs(answers, train, 0)
    assert teacher.seen - before == COUNT
    outputs(answers, train, 1)
    assert teacher.seen - before == 2 * COUNT
    again = outputs(answers, train, 2)  # view 0 in another order of batches
    assert teacher.seen - before == 2 * COUNT
    assert answers.counts.computed == 2 * COUNT
    assert answers.counts.read == COUNT
    for epoch, said in ((0, first), (2, again)):
        for batch, answer in zip(train.epoch(epoch), said, strict=True):
            expected = teacher(batch.images)
            expected = expected - expected.amax(dim=1, keepdim=True)
            assert torch.allclose(answer.logits, expected, atol=2e-3)
            assert torch.equal(
                answer.logits, expected.half().float()
            )  # what is trained on is the record, from the start


def test_float32_records_are_the_teachers_own_bits(images, tmp_path):
    teacher, train = Network(), loader(images)
    distiller = Distiller(Network(), teacher, KD())
    answers = recorded(distiller, train, [shelf(tmp_path, kind="float32")])
    outputs(answers, train, 0)
    for batch, answer in zip(train.epoch(0), outputs(answers, train, 0), strict=True):
        assert torch.equal(answer.logits, teacher(batch.images))


def test_another_process_finds_what_was_flushed(images, tmp_path):
    teacher, train = Network(), loader(images)
    distiller = Distiller(Network(), teacher, KD())
    answers = recorded(distiller, train, [shelf(tmp_path)])
    said = outputs(answers, train, 0)
    answers.close()
    teacher.seen = 0
    later = recorded(distiller, train, [shelf(tmp_path)])
    for one, other in zip(said, outputs(later, train, 0), strict=True):
        assert torch.equal(one.logits, other.logits)
    assert teacher.seen == 0


def test_every_teacher_has_its_own_store_and_they_are_combined_as_if_asked(images, tmp_path):
    teachers, train = [Network(), Network()], loader(images)
    distiller = Distiller(Network(), teachers, DIST(), teacher_weights=[1.0, 3.0])
    answers = recorded(distiller, train, [shelf(tmp_path, name, "float32") for name in "ab"])
    outputs(answers, train, 0)
    assert all(len(answer.members) == 2 for answer in outputs(answers, train, 2))
    answers.start_epoch(0)
    for batch in train.epoch(0):
        assert torch.equal(answers(batch).logits, distiller.run_teacher(batch.images).logits)


def test_embeddings_are_kept_for_methods_that_read_them_and_the_head_is_the_teachers(images, tmp_path):
    torch.manual_seed(0)
    teacher, train = Network(6), loader(images)
    distiller = Distiller(Network(), teacher, SRRL(), example=torch.randn(2, 3, SIZE, SIZE))
    answers = recorded(distiller, train, [shelf(tmp_path, kind="float32", embedding=6)])
    outputs(answers, train, 0)
    answers.start_epoch(0)
    for batch in train.epoch(0):
        known, live = answers(batch), distiller.run_teacher(batch.images)
        assert torch.equal(known.embedding, live.embedding)
        assert torch.equal(known.head.weight, teacher.fc.weight)
        step, expected = (distiller(batch.images, batch.labels, teacher=said) for said in (known, live))
        assert {name: term.item() for name, term in step.terms.items()} == pytest.approx(
            {name: term.item() for name, term in expected.terms.items()}
        )


def test_second_views_have_stores_of_their_own(images, tmp_path):
    teacher, train = Network(), loader(images, second="strong")
    distiller = Distiller(Network(), teacher, MLLD(), example=torch.randn(4, 3, SIZE, SIZE))
    answers = recorded(distiller, train, [shelf(tmp_path, "a", "float32")], [shelf(tmp_path, "b", "float32")])
    outputs(answers, train, 0)
    seen = teacher.seen
    answers.start_epoch(0)
    known = [(batch, answers(batch)) for batch in train.epoch(0)]
    assert teacher.seen == seen
    for batch, answer in known:
        live = distiller.run_teacher(batch.images, batch.second)
        assert torch.equal(answer.logits, live.logits)
        assert torch.equal(answer.second.logits, live.second.logits)


class Broken:
    """A shelf whose disk is full."""

    record = RecordFormat("float16", CLASSES, 0)

    def read(self, view, ids):
        return np.zeros((len(ids), self.record.nbytes), np.uint8), np.zeros(len(ids), bool)

    def write(self, view, ids, records):
        raise StorageError("cannot write logits.bin: No space left on device")

    def flush(self):
        raise StorageError("cannot write")

    close = flush


def test_a_store_that_fails_is_reported_once_and_the_live_answers_are_rounded_as_before(images, tmp_path):
    train = loader(images)
    distiller = Distiller(Network(), Network(), KD())
    intact = recorded(distiller, train, [shelf(tmp_path)])
    expected = [outputs(intact, train, epoch) for epoch in (0, 1)]
    told = []
    answers = recorded(distiller, train, [Broken()], warn=told.append)
    for epoch in (0, 1):
        for ours, theirs in zip(outputs(answers, train, epoch), expected[epoch], strict=True):
            assert torch.equal(ours.logits, theirs.logits)
            assert torch.equal(ours.logits, ours.logits.half().float())
    answers.close()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert "runs in every step" in told[0]


def test_the_16_largest_are_read_at_the_temperature_of_the_method(images, tmp_path):
    networks = Network(), Network()
    for network in networks:
        network.fc = nn.Linear(4, 80)
    record, train = RecordFormat("top16", 80), loader(images, views=1)
    store = TeacherCache.open(tmp_path, {"name": "a"}, record, COUNT, {})
    answers = recorded(Distiller(*networks, KD(temperature=4.0)), train, [store])
    for batch, answer in zip(train.epoch(0), outputs(answers, train, 0), strict=True):
        kept = record.encode(networks[1](batch.images).detach().numpy())
        softened, plain = (torch.from_numpy(record.decode(kept, at)[0]) for at in (4.0, None))
        assert torch.equal(answer.logits, softened)
        assert not torch.allclose(softened, plain, atol=1e-3)
