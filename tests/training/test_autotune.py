import copy

import pytest
import torch
from torch import nn

from potstill.training.autotune import (
    MAX_ROUNDS,
    MAX_SECONDS,
    MIN_ROUNDS,
    MIN_SPEEDUP,
    ThreadChoice,
    create_timed_step,
    select_fastest,
)
from potstill.training.devices import Compute

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)


class Machine:
    """A clock, and steps that last as long as they are said to by number of threads."""

    def __init__(self, seconds):
        self.seconds, self.now, self.threads, self.steps = seconds, 0.0, None, []

    def set_threads(self, threads):
        self.threads = threads

    def clock(self):
        return self.now

    def step(self):
        lasts = self.seconds[self.threads]
        count = sum(1 for threads in self.steps if threads == self.threads)
        self.now += lasts(count) if callable(lasts) else lasts
        self.steps.append(self.threads)

    def calibrate(self, candidates):
        return ThreadChoice(*select_fastest(self.step, candidates, apply=self.set_threads, clock=self.clock))


@pytest.mark.parametrize(
    ("one", "two", "kept"),
    [
        (0.020, 0.010, 2),  # idle cores
        (0.010, 0.010, 2),
        (0.0100, 0.0108, 2),  # may be chance
        (0.0100, 0.0112, 1),
        (0.010, 0.150, 1),  # a busy neighbour
    ],
)
def test_several_threads_unless_one_is_clearly_faster(one, two, kept):
    machine = Machine({1: one, 2: two})
    found = machine.calibrate([2, 1])
    assert (found.threads, machine.threads) == (kept, kept)
    assert found.seconds == pytest.approx({1: one, 2: two})
    assert MIN_SPEEDUP == 1.1


def test_candidates_take_turns_after_one_step_each_that_does_not_count():
    machine = Machine({1: lambda count: 9.0 if count == 0 else 0.010, 4: lambda count: 0.0 if count == 0 else 0.030})
    found = machine.calibrate([4, 1])
    assert machine.steps == [4, 1] * (1 + MAX_ROUNDS)
    assert found == ThreadChoice(1, pytest.approx({4: 0.030, 1: 0.010}))


def test_one_slow_moment_decides_nothing():
    machine = Machine({1: 0.020, 2: lambda count: 0.3 if count == 2 else 0.011})
    assert machine.calibrate([2, 1]).threads == 2


def test_slow_steps_are_timed_less_often():
    for lasts, rounds in ((0.001, MAX_ROUNDS), (0.3, MIN_ROUNDS), (1.5, 2), (MAX_SECONDS, 1)):
        machine = Machine({1: lasts, 2: lasts})
        machine.calibrate([2, 1])
        assert len(machine.steps) == 2 * (1 + rounds)


def test_with_one_candidate_nothing_is_timed():
    machine = Machine({})
    assert machine.calibrate([3]) == ThreadChoice(3)
    assert machine.threads == 3


def test_a_step_that_fails_leaves_the_preferred_number():
    machine = Machine({2: 0.1})  # with one thread: KeyError
    with pytest.raises(KeyError):
        machine.calibrate([2, 1])
    assert machine.threads == 2


def test_facts_come_back():
    found = ThreadChoice(2, {2: 0.01, 1: 0.015})
    assert found.to_dict() == {"threads": 2, "calibration": {"1": 0.015, "2": 0.01}}
    assert ThreadChoice.from_dict(found.to_dict()) == found
    assert ThreadChoice.from_dict(ThreadChoice(1).to_dict()) == ThreadChoice(1)
    assert ThreadChoice.from_dict({"threads": 2}) is None  # torch's own number: nobody has chosen it
    assert ThreadChoice.from_dict({}) is None


def test_words():
    assert str(ThreadChoice(1)) == "1 CPU thread"
    assert str(ThreadChoice(2, {1: 0.0181, 2: 0.0124})) == (
        "2 CPU threads: a step on a small batch takes 0.0124 s, 0.0181 s with 1"
    )


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_timed_step_leaves_no_trace(training):
    """Weights, gradients, BatchNorm's statistics, the mode, an optimizer's state, random numbers."""
    student = network().train(training)
    optimizer = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    before = copy.deepcopy((student.state_dict(), optimizer.state_dict()["state"]))
    random = torch.get_rng_state()
    step = create_timed_step(student, 16, 32, CPU)
    step()
    step()
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close((student.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert all(bool((parameter.grad == 0.5).all()) for parameter in student.parameters())
    assert all(module.training is training for module in student.modules())


def test_large_images_are_timed_in_small_batches():
    sizes = []

    class Counting(nn.Linear):
        def forward(self, images):
            sizes.append(tuple(images.shape))
            return super().forward(images.mean(dim=(2, 3)))

    for size, batch in ((32, 256), (64, 8), (224, 128), (512, 1)):
        create_timed_step(Counting(3, 2), size, batch, CPU)()
    assert sizes == [(64, 3, 32, 32), (8, 3, 64, 64), (2, 3, 224, 224), (2, 3, 512, 512)]
