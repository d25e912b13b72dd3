"""Ended by a signal at any step and resumed equals never ended: weights, figures, and what the method remembers."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn

from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.distillation.distiller import Distiller
from potstill.errors import NonFiniteError, Stopped
from potstill.input_spec import InputSpec
from potstill.methods import create_method
from potstill.training.callbacks import SignalHandler, SilentObserver
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer

pytestmark = pytest.mark.own_process

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)
CLASSES, IMAGES, BATCH = 3, 22, 4
STEPS = 6  # batches of an epoch, the last of two images
EPOCHS = 3


def loader(order="shuffled"):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
    labels = (torch.arange(IMAGES) % CLASSES).tolist()
    images = ArraySet(pixels, labels, [f"{i}" for i in range(IMAGES)])
    augment = AugmentSettings(hflip=True, pad_crop=0.1) if order == "shuffled" else None
    return Loader(images, InputSpec(8), batch_size=BATCH, augment=augment, order=order, seed=3)


class Blocks(nn.Sequential):
    def group_matcher(self, coarse=False):
        """As timm's networks: each layer is a block."""
        return {"blocks": r"^(\d+)"}


def network(seed):
    torch.manual_seed(seed)
    return Blocks(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, CLASSES)
    )


class AtStep(SilentObserver):
    """Sends a signal to this process after so many steps in all, or so many batches of evaluation."""

    def __init__(self, after, number=signal.SIGTERM):
        self.left, self.number = after, number

    def step(self, images):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def training(folder, method="kd", observer=None, stopping=None, **settings):
    name, options = (method, {}) if isinstance(method, str) else method
    made = create_method(name, **options)
    student, teacher = network(0), network(1) if made.needs.teacher else None
    train = loader()
    torch.manual_seed(7)
    distiller = Distiller(
        student, teacher, made, example=torch.zeros(2, 3, 8, 8), train_labels=train.labels, batch_size=BATCH
    )
    settings = {"epochs": EPOCHS, "lr": 0.02, "schedule": "cosine", "checkpoint_seconds": 0} | settings
    return Trainer(
        distiller, train, loader("listed"), TrainingSettings(**settings), CPU, folder=folder,
        observer=observer or SilentObserver(), classes=CLASSES, signals=stopping,
    )  # fmt: skip


def outcome(run):
    timing = ("seconds", "images_per_second")
    records = [{key: value for key, value in each.items() if key not in timing} for each in run.history.records]
    state = {key: value.clone() for key, value in run.distiller.state_dict().items()}
    return records, state, run.history.best_epoch


def same(one, two):
    (records, state, best), (others, other_state, other_best) = one, two
    assert records == others
    assert state.keys() == other_state.keys()
    assert all(torch.equal(value, other_state[key]) for key, value in state.items())
    assert best == other_best


def ended(folder, after, number=signal.SIGTERM, **settings):
    """Ends a training after so many of its steps."""
    with SignalHandler() as stopping:
        run = training(folder, observer=AtStep(after, number), stopping=stopping, **settings)
        with pytest.raises(Stopped) as stopped:
            run.run()
    assert stopped.value.exit_code == 128 + number
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = training(tmp_path_factory.mktemp("whole"))
    run.run()
    return outcome(run)


@pytest.mark.parametrize("after", [1, 2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 3, EPOCHS * STEPS])
def test_at_any_step(tmp_path, whole, after):
    run = ended(tmp_path, after)
    assert len(run.history.records) == (after - 1) // STEPS  # no step more than the one under way
    again, updates = training(tmp_path), []
    again.optimizer.register_step_post_hook(lambda *_: updates.append(1))
    again.run(resume=True)
    same(outcome(again), whole)
    assert len(updates) == EPOCHS * STEPS - after  # what was done is not done again


def test_at_every_step_of_one_training(tmp_path, whole):
    ended(tmp_path, 1)
    for _ in range(EPOCHS * STEPS - 1):
        with SignalHandler() as stopping:
            run = training(tmp_path, observer=AtStep(2), stopping=stopping)
            # The steps that were done are told first, so the second is new; none is new at an epoch's beginning.
            with pytest.raises(Stopped):
                run.run(resume=True)
    run = training(tmp_path)
    run.run(resume=True)
    same(outcome(run), whole)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("pskd", {}),  # turns over what it remembers when an epoch begins
        (("ikl", {"class_prior": True}), {}),
        ("crd", {}),  # draws from the global generator, and has a memory
        ("kd", {"optimizer": "dot"}),
        ("kd", {"gradient_accumulation_steps": 2}),
        ("kd", {"ema_decay": 0.8}),
        ("kd", {"layer_decay": 0.3}),
        (("at", {"weight": 1e4, "scaling": "auto"}), {}),  # the second stop is within the steps that are measured
        (("kd", {"schedule": {"kd": {"shape": "linear", "start": 0.2, "end": 0.8}}}), {}),
    ],
)
def test_whatever_there_is_besides_weights(tmp_path, method, settings):
    run = training(tmp_path / "whole", method, **settings)
    run.run()
    for after in (2 * STEPS - 2, STEPS + 1):
        folder = tmp_path / str(after)
        ended(folder, after, method=method, **settings)
        again = training(folder, method, **settings)
        again.run(resume=True)
        same(outcome(again), outcome(run))


def test_while_it_is_evaluated(tmp_path, whole):
    class InEvaluation(SilentObserver):
        def epoch_start(self, *_):
            self.steps = 0

    with SignalHandler() as stopping:
        run = training(tmp_path, stopping=stopping)
        plain, calls = run.eval_loaders["val"].epoch, []

        def epoch(number=0, step=0):
            for batch in plain(number, step):
                calls.append(len(batch))
                if len(calls) == STEPS + 2:  # the second evaluation
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        run.eval_loaders["val"].epoch = epoch
        with pytest.raises(Stopped) as stopped:
            run.run()
    assert stopped.value.exit_code == 130
    assert len(calls) <= STEPS + 3
    assert len(run.history.records) == 1
    again = training(tmp_path)
    again.run(resume=True)
    same(outcome(again), whole)


def test_killed_between_two_checkpoints_within_an_epoch(tmp_path, whole):
    class Killed(Exception):
        pass

    class Mortal(AtStep):
        def step(self, images):
            self.left -= 1
            if self.left == 0:
                raise Killed

    run = training(tmp_path, observer=Mortal(STEPS + 4), checkpoint_seconds=1e-9)  # a checkpoint at each step
    with pytest.raises(Killed):
        run.run()
    again = training(tmp_path, observer=(counting := AtStep(-1)))
    again.run(resume=True)
    # Told of the three steps of the second epoch that had been saved in one, and of all others one by one.
    assert counting.left == -1 - (1 + (STEPS - 3) + STEPS)
    same(outcome(again), whole)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    run = training(tmp_path, checkpoint_seconds=1e-9)

    class Spoiling(SilentObserver):
        seen = 0

        def step(self, images):
            self.seen += 1
            if self.seen == 3:
                with torch.no_grad():
                    run.distiller.student[0].weight[0, 0, 0, 0] = float("nan")

    run.observer = Spoiling()
    with pytest.raises(NonFiniteError, match=r"epoch 1: the weights student\.0\.weight have become NaN or infinite"):
        run.run()
    again = training(tmp_path)
    again.run(resume=True)  # from the second step
    assert len(again.history.records) == EPOCHS


def test_outside_of_training_it_ends_at_once():
    with SignalHandler(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_within_a_finalizer_is_not_lost():
    class Interrupted:
        def __del__(self):  # an exception here is ignored
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def interrupt():
        Interrupted()
        time.sleep(10)

    with SignalHandler(), pytest.raises(Stopped):
        interrupt()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.unraisablehook
    with SignalHandler():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert sys.unraisablehook == hook
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_may_train_and_hears_nothing():
    found = []

    def work():
        with SignalHandler() as stopping, stopping.deferred():
            found.append(stopping.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_the_second_signal_does_not_wait():
    pid = os.fork()
    if pid == 0:
        with SignalHandler() as stopping, stopping.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            if stopping.requested != signal.SIGTERM:
                os._exit(3)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(4)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
