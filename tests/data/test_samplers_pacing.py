"""Who is admitted when, against values worked out by hand, and what an epoch then draws."""

import numpy as np
import pytest

from potstill.data.samplers import Curriculum, EpochSampler, curriculum_order, curriculum_share


def test_shares_by_hand():
    # until the third of five epochs: 0.2 + 0.8 / 2 half-way
    found = [curriculum_share(epoch, 5, start=0.2, until=0.5) for epoch in range(5)]
    assert found == pytest.approx([0.2, 0.6, 1.0, 1.0, 1.0], abs=1e-12)


def test_shares_never_fall_and_end_with_all():
    for epochs in (2, 3, 7, 40):
        for until in (0.1, 0.5, 1.0):
            shares = [curriculum_share(epoch, epochs, start=0.05, until=until) for epoch in range(epochs)]
            assert shares == sorted(shares)
            assert shares[0] == pytest.approx(0.05)
            assert shares[-1] == 1.0
    assert curriculum_share(0, 1, start=0.05, until=0.5) == 0.05  # of one epoch, the first is the last


def test_classes_enter_at_the_same_rate_whatever_their_size_and_difficulty():
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1, 2], [100, 40, 10]))
    difficulty = random.random(150) + 10 * (labels == 2)  # each of class 2 is harder than every other image
    order = curriculum_order(difficulty, labels)
    assert sorted(order.tolist()) == list(range(150))
    for share in (0.1, 0.3, 0.5, 0.9):
        first = np.bincount(labels[order[: round(share * 150)]], minlength=3)
        assert np.abs(first - share * np.array([100, 40, 10])).max() <= 1
    for label in range(3):
        own = difficulty[order[labels[order] == label]]
        assert (np.diff(own) >= 0).all()


def test_of_equal_difficulty_the_smaller_id_comes_first():
    assert curriculum_order(np.zeros(4), np.zeros(4, dtype=np.int64)).tolist() == [0, 1, 2, 3]


@pytest.fixture
def epochs():
    """Ten images, the last ones first: three in the first epoch, five in the second, then all."""
    admitted = Curriculum(np.arange(10)[::-1].copy(), (3, 5, 10))
    return EpochSampler(np.arange(10) % 2, 4, "shuffled", 5, curriculum=admitted)


def test_an_epoch_draws_from_those_admitted_as_evenly_as_it_can(epochs):
    shown = [np.concatenate(epochs.batches(epoch)) for epoch in range(5)]
    assert [sorted(set(each.tolist())) for each in shown] == [[7, 8, 9], [5, 6, 7, 8, 9], *[list(range(10))] * 3]
    assert sorted(np.bincount(shown[0], minlength=10)[7:]) == [3, 3, 4]
    assert np.bincount(shown[1], minlength=10)[5:].tolist() == [2] * 5
    assert shown[2].tolist() != shown[3].tolist()  # a new order in each epoch


def test_there_are_as_many_steps_as_without(epochs):
    plain = EpochSampler(epochs.labels, 4, "shuffled", 5)
    assert (epochs.steps, epochs.count) == (plain.steps, plain.count) == (3, 10)
    for epoch in range(5):
        assert [len(batch) for batch in epochs.batches(epoch)] == [len(batch) for batch in plain.batches(epoch)]


def test_what_is_evaluated_follows_no_curriculum(epochs):
    listed = EpochSampler(epochs.labels, 4, "listed", 5, curriculum=epochs.curriculum)
    assert np.concatenate(listed.batches(0)).tolist() == list(range(10))


def test_a_draw_depends_on_seed_and_epoch_and_not_on_the_batch_size(epochs):
    other = EpochSampler(epochs.labels, 5, "shuffled", 5, curriculum=epochs.curriculum)
    again = EpochSampler(epochs.labels, 4, "shuffled", 6, curriculum=epochs.curriculum)
    for epoch in range(3):
        drawn = np.concatenate(epochs.batches(epoch)).tolist()
        assert np.concatenate(other.batches(epoch)).tolist() == drawn
        assert np.concatenate(again.batches(epoch)).tolist() != drawn
