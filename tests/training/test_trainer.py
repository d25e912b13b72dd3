"""The loop, on numbers small enough to follow: a loader of two-pixel images."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import NonFiniteError, Stopped
from potstill.evaluation.predictions import predict_probabilities
from potstill.methods import create_method
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.training.callbacks import SignalHandler, SilentObserver
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer, _RequestExchange
from potstill.types import Batch

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)


class Numbers:
    """A loader of ``count`` images whose class can be read off their first channel."""

    def __init__(self, count, batch_size=4, seed=0, poison=None):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        self.images = torch.randn(count, 3, 2, 2, generator=generator) * 0.5
        self.images[torch.arange(count), self.labels] += 1.0
        self.count, self.batch_size, self.poison = count, batch_size, poison
        self.steps = -(-count // batch_size)

    def ids_of(self, number):
        order = torch.from_numpy(np.random.default_rng(number).permutation(self.count))
        return order.split(self.batch_size)

    def names_at(self, number, step):
        return [str(i) for i in self.ids_of(number)[step - 1].tolist()]

    def sizes_of(self, number):
        return [len(index) for index in self.ids_of(number)]

    def epoch(self, number=0, step=0):
        for position, index in enumerate(self.ids_of(number)[step:], start=step):
            images = self.images[index]
            if self.poison == (number, position):
                images = images * float("inf")
            yield Batch(images, self.labels[index], index, torch.full_like(index, number))


class Counting(nn.Module):
    """A classifier that knows how often it was asked, in which mode, and drops out."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
        self.modes = []

    def forward(self, images):
        self.modes.append(self.training)
        return self.net(images)


def train(folder, settings=None, method=None, teacher=None, resume=False, loader=None, epochs_run=None, **kwargs):
    torch.manual_seed(0)
    student = Counting()
    distiller = Distiller(student, teacher, method or Supervised())
    settings = settings or TrainingSettings(epochs=4, lr=0.05, checkpoint_seconds=0)
    training = Trainer(
        distiller,
        loader or Numbers(18),
        Numbers(9, seed=1),
        settings,
        CPU,
        folder=folder,
        observer=SilentObserver(),
        classes=3,
        **kwargs,
    )
    if epochs_run is not None:  # a process that dies after so many epochs

        class Died(Exception):
            pass

        class Mortal(SilentObserver):
            def epoch_start(self, epoch, *_):
                if epoch > epochs_run:
                    raise Died

        training.observer = Mortal()
        with pytest.raises(Died):
            training.run(resume=resume)
        return training.history, student
    return training.run(resume=resume), student


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_writes_a_line_an_epoch(tmp_path):
    history, _ = train(tmp_path)
    records = lines(tmp_path)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"]
    assert history.best_value == max(record["val"]["top1"] for record in records)
    first_best = next(r["epoch"] for r in records if r["val"]["top1"] == history.best_value)
    assert history.best_epoch == first_best
    for record in records:
        assert record["train"]["loss"] == pytest.approx(record["train"]["terms"]["ce"])
        assert record["train"]["count"] == 18
        assert record["val"]["count"] == 9


def test_student_is_in_train_mode_in_every_epoch(tmp_path):
    _, student = train(tmp_path, TrainingSettings(epochs=3))
    per_epoch = [True] * 5 + [False] * 3  # 18 images and 9 images in fours
    assert student.modes == per_epoch * 3


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_every_update_is_made_at_the_rate_of_its_schedule(tmp_path, gradient_accumulation_steps):
    settings = TrainingSettings(
        epochs=3,
        lr=0.4,
        schedule="cosine",
        warmup_epochs=1,
        gradient_accumulation_steps=gradient_accumulation_steps,
        checkpoint_seconds=0,
    )
    torch.manual_seed(0)
    student = Counting()
    training = Trainer(
        Distiller(student, None, Supervised()), Numbers(16), Numbers(9, seed=1), settings, CPU,
        folder=tmp_path, observer=SilentObserver(), classes=3,
    )  # fmt: skip
    rates = []
    training.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    training.run()
    each = 4 // gradient_accumulation_steps  # updates an epoch
    rising = [0.4 * (step + 1) / each for step in range(each)]
    falling = [0.4 * (1 + math.cos(math.pi * step / (2 * each))) / 2 for step in range(2 * each)]
    assert rates == pytest.approx(rising + falling)


def test_a_training_that_is_made_longer_goes_on_at_the_rate_of_the_longer_schedule(tmp_path):
    settings = {"lr": 0.4, "schedule": "cosine", "checkpoint_seconds": 0}
    train(tmp_path, TrainingSettings(epochs=2, **settings))
    torch.manual_seed(0)
    training = Trainer(
        Distiller(Counting(), None, Supervised()), Numbers(18), Numbers(9, seed=1),
        TrainingSettings(epochs=4, **settings), CPU, folder=tmp_path, observer=SilentObserver(), classes=3,
    )  # fmt: skip
    rates = []
    training.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    training.run(resume=True)
    assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(10, 20)])


def test_the_layers_of_a_method_are_trained_too(tmp_path):
    torch.manual_seed(0)
    distiller = Distiller(Counting(), Counting(), create_method("cc", dim=4), example=torch.randn(4, 3, 2, 2))
    before = {name: parameter.clone() for name, parameter in distiller.method.named_parameters()}
    assert {name.partition(".")[0] for name in before} == {"embed_student", "embed_teacher"}
    Trainer(
        distiller, Numbers(18), Numbers(9, seed=1), TrainingSettings(epochs=1, lr=0.05), CPU,
        folder=tmp_path, observer=SilentObserver(), classes=3,
    ).run()  # fmt: skip
    for name, parameter in distiller.method.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_the_best_epochs_weights_are_what_remains(tmp_path):
    # Far too large a rate from epoch 2 on: epoch 1 stays the best.
    settings = TrainingSettings(epochs=3, optimizer="sgd", lr=0.05, schedule="step", milestones=[1], gamma=1e-6)
    history, student = train(tmp_path, settings.model_copy(update={"selection_metric": "nll"}))
    best = min(lines(tmp_path), key=lambda record: record["val"]["loss"])
    assert history.best_epoch == best["epoch"]
    student.eval()
    val = Numbers(9, seed=1)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(student(val.images), val.labels).item()
    assert loss == pytest.approx(best["val"]["loss"], rel=1e-5)


def test_same_seed_same_weights(tmp_path):
    (_, one), (_, two) = train(tmp_path / "a"), train(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, after, ema):
    settings = TrainingSettings(epochs=5, lr=0.05, schedule="cosine", checkpoint_seconds=0, ema_decay=ema)
    whole, one = train(tmp_path / "whole", settings)
    train(tmp_path / "cut", settings, epochs_run=after)
    resumed, two = train(tmp_path / "cut", settings, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert resumed.best_epoch == whole.best_epoch

    def figures(folder):
        timing = ("seconds", "images_per_second")
        return [{key: value for key, value in record.items() if key not in timing} for record in lines(folder)]

    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_test_is_never_looked_at_unless_asked(tmp_path):
    class Forbidden(Numbers):
        def epoch(self, number=0, step=0):
            raise AssertionError("test was read")

    train(tmp_path / "a")
    assert "test" not in lines(tmp_path / "a")[0]
    with pytest.raises(AssertionError, match="test was read"):
        train(tmp_path / "b", test=Forbidden(9))
    train(tmp_path / "c", test=Numbers(9, seed=2))
    assert "test" in lines(tmp_path / "c")[0]


def test_a_better_test_split_never_changes_the_choice(tmp_path):
    settings = TrainingSettings(epochs=5, lr=0.01, selection_metric="nll")
    without, one = train(tmp_path / "a", settings)
    contrary = Numbers(9, seed=1)
    contrary.labels = (contrary.labels + 1) % 3  # the better the student, the worse it looks here
    with_test, two = train(tmp_path / "b", settings, test=contrary)
    by_test = min(lines(tmp_path / "b"), key=lambda record: record["test"]["loss"])["epoch"]
    assert by_test != with_test.best_epoch
    assert without.best_epoch == with_test.best_epoch
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_teacher_is_asked_once_for_each_val_image(tmp_path):
    torch.manual_seed(5)
    teacher = Counting()
    train(tmp_path, TrainingSettings(epochs=3), KD(), teacher)
    assert len(teacher.modes) == 3 * 5 + 3  # every training step; val's three batches in the first epoch only
    assert not any(teacher.modes)


def test_terms_of_a_distilled_epoch(tmp_path):
    train(tmp_path, TrainingSettings(epochs=1), KD(alpha=0.3), Counting())
    for split in ("train", "val"):
        figures = lines(tmp_path)[0][split]
        assert set(figures["terms"]) == {"ce", "kd"}
        assert figures["loss"] == pytest.approx(sum(figures["terms"].values()))
        assert figures["nll"] == pytest.approx(figures["terms"]["ce"] / 0.3, rel=1e-5)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    class Linear(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(12, 3))

    def weights(batch_size, gradient_accumulation_steps, folder):
        torch.manual_seed(0)
        net = Linear()
        Trainer(
            Distiller(net, None, Supervised()),
            Numbers(16, batch_size),
            Numbers(9, seed=1),
            TrainingSettings(
                epochs=1, optimizer="sgd", lr=0.1, gradient_accumulation_steps=gradient_accumulation_steps
            ),
            CPU,
            folder=folder,
            observer=SilentObserver(),
            classes=3,
        ).run()
        return net[1].weight

    torch.testing.assert_close(weights(8, 1, tmp_path / "a"), weights(4, 2, tmp_path / "b"))


def test_clipping_bounds_the_step(tmp_path):
    settings = TrainingSettings(epochs=1, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0, max_grad_norm=1e-3)
    torch.manual_seed(0)
    before = [p.detach().clone() for p in Counting().parameters()]
    _, student = train(tmp_path, settings)
    moved = sum((a - b).square().sum() for a, b in zip(before, student.parameters(), strict=True)).sqrt()
    assert 0 < moved <= 5 * 1e-3 + 1e-6  # five steps


def test_averaged_weights_follow_the_definition(tmp_path):
    decay = 0.75
    settings = TrainingSettings(epochs=1, optimizer="sgd", lr=0.1, ema_decay=decay)
    seen = []

    class Watching(SilentObserver):
        def step(self, images):
            seen.append(student.net[1].weight.detach().clone())

    torch.manual_seed(0)
    student = Counting()
    training = Trainer(
        Distiller(student, None, Supervised()),
        Numbers(18),
        Numbers(9, seed=1),
        settings,
        CPU,
        folder=tmp_path,
        observer=Watching(),
        classes=3,
    )
    training.run()
    expected = seen[0]  # the first update takes the weights as they are
    for updates, weight in enumerate(seen[1:], start=1):
        kept = min(decay, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(student.net[1].weight, expected)


@pytest.mark.parametrize(
    ("metric", "best"),
    [("auc_macro", 2), ("top1", 2), ("nll", 3)],  # epoch 1 separates the classes, with the wrong threshold
)
def test_of_epochs_with_an_equal_metric_the_first_with_the_higher_top1_is_best(metric, best, tmp_path, monkeypatch):
    found = iter(zip((0.2, 0.9, 0.9, 0.8), (0.9, 0.6, 0.5, 0.7), strict=True))

    def evaluate(*_):
        top1, nll = next(found)
        return {"count": 9, "loss": nll, "nll": nll, "top1": top1, "auc_macro": 1.0}

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    history, _ = train(tmp_path, TrainingSettings(epochs=4, selection_metric=metric))
    assert history.best_epoch == best


def test_early_stopping_waits_for_its_patience(tmp_path):
    settings = TrainingSettings(epochs=50, lr=1e-9, early_stopping_patience=3)
    history, _ = train(tmp_path, settings)
    assert len(history.records) == history.best_epoch + 3


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    settings = TrainingSettings(epochs=4, checkpoint_seconds=0)
    with pytest.raises(NonFiniteError, match="epoch 2, training: at step 3 the loss term ce"):
        train(tmp_path, settings, loader=Numbers(18, poison=(1, 2)))
    history, _ = train(tmp_path, settings, resume=True)  # healthy data now
    assert [record["epoch"] for record in history.records] == [1, 2, 3, 4]


def test_what_picks_an_epoch_is_what_is_reported_of_it(tmp_path):
    """Trained in bf16, val is evaluated in float32: to the last digit but rounding the final evaluation's figures."""
    torch.manual_seed(0)
    student = Counting()
    compute = Compute(torch.device("cpu"), bf16=True, channels_last=False)
    training = Trainer(
        Distiller(student, None, Supervised()),
        Numbers(18),
        Numbers(30, seed=1),
        TrainingSettings(epochs=3, lr=0.05),
        compute,
        folder=tmp_path,
        observer=SilentObserver(),
        classes=3,
    )
    history = training.run()
    picked = history.records[history.best_epoch - 1]["val"]
    logged = {}
    for precision in ("float32", "bf16"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            probabilities, labels, _ = predict_probabilities(student, Numbers(30, seed=1), classes=3)
        logged[precision] = -float(np.log(probabilities[np.arange(30), labels]).mean())
    assert picked["nll"] == pytest.approx(logged["float32"], rel=1e-6)
    assert logged["bf16"] != pytest.approx(logged["float32"], rel=1e-5)  # or this would show nothing


def in_fp16(folder, settings, resume=False, epochs_run=None):
    torch.manual_seed(0)
    compute = Compute(torch.device("cpu"), bf16=False, channels_last=False, fp16=True)
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    training = Trainer(
        Distiller(student, None, Supervised()), Numbers(18), Numbers(9, seed=1), settings, compute,
        folder=folder, observer=SilentObserver(), classes=3,
    )  # fmt: skip
    scaler = training.gradients.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**24})
    if epochs_run is not None:
        training.observer.epoch_start = lambda epoch, *_: (
            (_ for _ in ()).throw(KeyError) if epoch > epochs_run else None
        )
        with pytest.raises(KeyError):
            training.run(resume=resume)
    else:
        training.run(resume=resume)
    return training, student


def test_fp16_drops_updates_that_overflow_and_goes_on_with_its_scale_after_resuming(tmp_path):
    settings = TrainingSettings(epochs=4, lr=0.05, max_grad_norm=1.0, checkpoint_seconds=0)
    whole, one = in_fp16(tmp_path / "whole", settings)
    scaler = whole.gradients.scaler
    assert whole.history.records[-1]["train"]["loss"] < whole.history.records[0]["train"]["loss"]
    # 2 ** 24 times a gradient of 0.1 is infinite in float16: the scale has been halved, and no weight is NaN.
    assert 2**8 <= scaler.get_scale() < 2**24
    assert all(parameter.isfinite().all() for parameter in one.parameters())
    in_fp16(tmp_path / "cut", settings, epochs_run=2)
    again, other = in_fp16(tmp_path / "cut", settings, resume=True)
    assert again.gradients.scaler.state_dict() == scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Sluggish:
    """A group of two, whose other process has asked for nothing, and proposes an interval of its own."""

    several = True

    def __init__(self, other=-(10**9)):
        self.other, self.calls = other, 0

    def highest(self, number, due, wanted):
        self.calls += 1
        return max(number, 0), max(due, 0), max(wanted, self.other)


def exchanger(processes, clock):
    class Due:
        is_due = False

    signals = SignalHandler()
    signals.requested = None
    return _RequestExchange(signals, Due(), processes, clock), signals


def test_requests_are_exchanged_about_once_a_second_and_at_the_same_step():
    now = [0.0]
    processes = Sluggish()
    requests, signals = exchanger(processes, lambda: now[0])
    for _ in range(1000):  # ten seconds
        now[0] += 0.01
        assert requests.poll() is False
    assert 8 <= processes.calls <= 16
    signals.requested = 15  # of this process alone: the others know at the next exchange
    steps = 0

    def step():
        nonlocal steps
        steps, now[0] = steps + 1, now[0] + 0.01
        return requests.poll()

    with pytest.raises(Stopped):
        list(iter(step, None))
    assert steps <= 110
    requests.start()  # evaluation begins
    before = processes.calls
    signals.requested = None
    requests.poll()
    assert processes.calls == before + 1


def test_the_process_that_wants_the_shortest_interval_is_heard():
    now, processes = [0.0], Sluggish(other=-2)
    requests, _ = exchanger(processes, lambda: now[0])
    for _ in range(40):
        now[0] += 0.001
        requests.poll()
    assert processes.calls >= 19


def test_a_single_process_asks_at_every_step():
    processes = Sluggish()
    processes.several = False
    requests, signals = exchanger(processes, lambda: 0.0)
    signals.requested = 2
    with pytest.raises(Stopped):
        requests.poll()
