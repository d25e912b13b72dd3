"""What the loop hands to methods: epochs, second images, mixed and missing labels, gradients apart."""

import json

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.methods.base import Method
from potstill.methods.kd import KD
from potstill.methods.requirements import Requirements
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer
from potstill.types import Batch

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)


class Numbers:
    """A loader of 12 images in fours; ``extra`` changes each batch."""

    count, steps = 12, 3

    def __init__(self, seed=0, extra=None):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(12) % 3
        self.images = torch.randn(12, 3, 2, 2, generator=generator)
        self.images[torch.arange(12), self.labels] += 1.0
        self.extra = extra

    def names_at(self, number, step):
        return ["a", "b"]

    def sizes_of(self, number):
        return [4, 4, 4]

    def epoch(self, number=0, step=0):
        for index in torch.arange(12).split(4)[step:]:
            batch = Batch(self.images[index], self.labels[index], index, torch.full_like(index, number))
            yield self.extra(batch) if self.extra else batch


class Watching(Method):
    """Notes what it is given."""

    def __init__(self, **needs):
        super().__init__()
        self.needs = Requirements(teacher=False, **needs)
        self.seen, self.begun = [], []

    def start_epoch(self, epoch, epochs):
        super().start_epoch(epoch, epochs)
        self.begun.append((epoch, epochs, self.training))

    def forward(self, student, teacher, batch):
        self.seen.append((self.epoch, self.training, batch, student))
        return super().forward(student, teacher, batch)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def training(folder, method, loader=None, teacher=None, **settings):
    net = network()
    torch.manual_seed(0)
    return Trainer(
        Distiller(net, teacher, method),
        loader or Numbers(),
        Numbers(seed=1),
        TrainingSettings(**({"epochs": 3, "lr": 0.05, "checkpoint_seconds": 0} | settings)),
        CPU,
        folder=folder,
        observer=SilentObserver(),
        classes=3,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Died(Exception):
    pass


def cut(folder, method, after, **options):
    """A training whose process dies at the start of an epoch."""
    dying = training(folder, method, **options)

    class Mortal(SilentObserver):
        def epoch_start(self, epoch, *_):
            if epoch > after:
                raise Died

    dying.observer = Mortal()
    with pytest.raises(Died):
        dying.run()


def test_every_epoch_is_announced_before_its_first_step_and_after_resuming(tmp_path):
    method = Watching(epoch=True)
    training(tmp_path / "whole", method).run()
    assert [begun[:2] for begun in method.begun] == [(0, 3), (1, 3), (2, 3)]
    assert [epoch for epoch, *_ in method.seen] == [0] * 6 + [1] * 6 + [2] * 6  # three steps and three of val
    cut(tmp_path / "cut", Watching(epoch=True), 2)
    again = Watching(epoch=True)
    training(tmp_path / "cut", again).run(resume=True)
    assert [begun[:2] for begun in again.begun] == [(2, 3)]
    assert {epoch for epoch, *_ in again.seen} == {2}


def test_second_images_and_shares_of_labels_reach_the_method(tmp_path):
    def extra(batch):
        soft = torch.full((4, 3), 1 / 3)
        return Batch(batch.images, batch.labels, batch.index, batch.view, batch.images + 5, soft)

    method = Watching(second="strong")
    training(tmp_path, method, Numbers(extra=extra), epochs=1).run()
    assert len(method.seen) == 3  # val has label terms only
    loader = Numbers()
    for position, (_, _, batch, student) in enumerate(method.seen):
        rows = slice(4 * position, 4 * position + 4)
        assert torch.equal(batch.second, loader.images[rows] + 5)
        assert torch.equal(batch.soft_labels, torch.full((4, 3), 1 / 3))
        assert student.second.logits.shape == (4, 3)
    assert lines(tmp_path)[0]["train"]["terms"]["ce"] > 0


class WithUnlabeled(Numbers):
    """After each four labeled images, two that nobody has labeled."""

    count, unlabeled = 18, "anything"

    def epoch(self, number=0, step=0):
        for batch in super().epoch(number, step):
            images = torch.cat([batch.images, batch.images[:2] + 0.5])
            labels = torch.cat([batch.labels, torch.tensor([-100, -100])])
            yield Batch(images, labels, torch.cat([batch.index, torch.tensor([12, 13])]), None)


def test_unlabeled_images_count_in_the_teachers_terms_alone(tmp_path):
    teacher = network()
    run = training(tmp_path, KD(alpha=0.3, temperature=4.0), WithUnlabeled(), teacher, epochs=1, lr=1e-12)
    student = run.distiller.student
    nn.init.normal_(student[4].weight)  # the teacher has the same weights otherwise
    run.run()
    figures, nll, right, kl = lines(tmp_path)[0]["train"], [], [], []
    student.train()
    for batch in WithUnlabeled().epoch():
        logits = student(batch.images).double()
        taught = teacher.eval()(batch.images).double()
        mine, theirs = (z.log_softmax(dim=1) for z in (logits / 4, taught / 4))
        nll += (-logits.log_softmax(dim=1)[torch.arange(4), batch.labels[:4]]).tolist()
        right += (logits[:4].argmax(dim=1) == batch.labels[:4]).tolist()
        kl += (16 * (theirs.exp() * (theirs - mine)).sum(dim=1)).tolist()
    assert figures["count"] == 12
    assert figures["top1"] == pytest.approx(sum(right) / 12)
    assert figures["nll"] == pytest.approx(sum(nll) / 12, rel=1e-4)
    assert figures["terms"]["ce"] == pytest.approx(0.3 * sum(nll) / 12, rel=1e-4)
    assert len(kl) == 18
    assert figures["terms"]["kd"] == pytest.approx(0.7 * sum(kl) / 18, rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "schedule": "cosine"}]
)
def test_dot_without_delta_trains_as_sgd_does(tmp_path, options):
    found = {}
    for name, settings in {"dot": {"dot_delta": 0.0}, "sgd": {}, "apart": {"dot_delta": 0.09}}.items():
        optimizer = "sgd" if name == "sgd" else "dot"
        run = training(tmp_path / name, KD(alpha=0.5), teacher=network(), optimizer=optimizer, **options, **settings)
        nn.init.normal_(run.distiller.student[4].weight)  # the teacher has the same weights otherwise
        run.run()
        found[name] = run.optimizer.param_groups[0]["params"][0].detach()
    torch.testing.assert_close(found["dot"], found["sgd"], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found["apart"], found["sgd"], atol=1e-5)


def test_dot_goes_on_where_it_was_interrupted(tmp_path):
    options = {"optimizer": "dot", "weight_decay": 0.01, "schedule": "cosine"}
    whole = training(tmp_path / "whole", KD(), teacher=network(), **options)
    whole.run()
    cut(tmp_path / "cut", KD(), 2, teacher=network(), **options)
    resumed = training(tmp_path / "cut", KD(), teacher=network(), **options)
    resumed.run(resume=True)
    one, two = (each.optimizer.state_dict()["state"] for each in (whole, resumed))
    assert one.keys() == two.keys() == set(range(6))
    for number, state in one.items():
        assert state.keys() == two[number].keys() == {"task", "distillation"}
        assert all(torch.equal(value, two[number][key]) for key, value in state.items())
