import numpy as np
import pytest

from potstill.data.samplers import EpochSampler, SameClassSampler, cycle_shuffled, uniform


def test_a_partner_is_another_sample_of_the_class_and_each_equally_likely() -> None:
    labels = np.array([0, 1, 0, 2, 0, 1])  # class 2 has one image
    partners = SameClassSampler(labels, seed=1)
    ids = np.arange(6)
    counts = np.zeros((6, 6), dtype=int)
    for view in range(3000):
        np.add.at(counts, (ids, partners(ids, view)), 1)
    assert counts[3].tolist() == [0, 0, 0, 3000, 0, 0]
    assert counts[1].tolist() == [0, 0, 0, 0, 0, 3000]
    assert counts[5].tolist() == [0, 3000, 0, 0, 0, 0]
    for sample, others in ((0, [2, 4]), (2, [0, 4]), (4, [0, 2])):
        assert counts[sample, others] == pytest.approx(1500, abs=150)  # 5 standard deviations
        assert counts[sample].sum() == counts[sample, others].sum()


def test_partners_by_a_slow_reference() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 50)
    found = SameClassSampler(labels, seed=9)(np.arange(50), 3)
    for sample in range(50):
        members = np.flatnonzero(labels == labels[sample]).tolist()
        ahead = 1 + int(uniform(9, "same class", np.array([sample]), 3)[0] * (len(members) - 1))
        assert found[sample] == members[(members.index(sample) + ahead) % len(members)]


def test_each_samples_partner_depends_on_its_own_view() -> None:
    partners, ids = SameClassSampler(np.zeros(40, dtype=np.int64), seed=0), np.arange(40)
    views = ids % 2
    mixed, even, odd = partners(ids, views), partners(ids, 0), partners(ids, 1)
    assert (mixed == np.where(views == 0, even, odd)).all()
    assert (even != odd).mean() > 0.8
    assert (partners(ids[[7, 3]], 0) == even[[7, 3]]).all()


def test_cycles_show_everyone_once_a_turn_in_new_orders() -> None:
    whole = cycle_shuffled(7, 3, 0, 21)
    turns = whole.reshape(3, 7)
    assert all(sorted(turn) == list(range(7)) for turn in turns.tolist())
    assert len({tuple(turn) for turn in turns.tolist()}) == 3
    for start, stop in ((0, 5), (5, 16), (13, 14), (14, 21), (6, 6)):
        assert cycle_shuffled(7, 3, start, stop).tolist() == whole[start:stop].tolist()
    assert cycle_shuffled(7, 4, 0, 21).tolist() != whole.tolist()


def test_unlabeled_images_fill_their_share_of_each_batch_whatever_its_size() -> None:
    labels = np.arange(12) % 3
    half = EpochSampler(labels, 4, "shuffled", 0, unlabeled=5)
    assert (half.count, half.labeled, half.steps) == (24, 12, 3)
    for batch in half.batches(0):
        assert (batch[:4] < 12).all()
        assert (batch[4:] >= 12).all()
        assert len(batch) == 8
    streams = {}
    for size in (4, 5, 12):  # a fifth: one for every four, wherever the batches end
        epochs = EpochSampler(labels, size, "shuffled", 0, unlabeled=5, unlabeled_share=0.2)
        assert epochs.count == 15
        streams[size] = [[i for b in epochs.batches(e) for i in b.tolist() if i >= 12] for e in range(10)]
    assert streams[4] == streams[5] == streams[12]
    shown = np.concatenate(streams[4])
    assert np.bincount(shown - 12).tolist() == [6] * 5  # 30 shown: six turns of five


def test_counts_without_unlabeled_images() -> None:
    labels = np.zeros(21, dtype=np.int64)
    assert EpochSampler(labels, 4, "shuffled", 0).labeled == 20  # the lonely last one
    assert EpochSampler(labels, 4, "listed", 0).labeled == 21


def test_an_epoch_may_be_longer_than_there_are_images() -> None:
    labels = np.zeros(5, dtype=np.int64)
    longer = EpochSampler(labels, 4, "shuffled", 0, length=12)
    assert (longer.labeled, longer.steps, longer.count) == (12, 3, 12)
    shown = np.concatenate([batch for epoch in range(5) for batch in longer.batches(epoch)])
    assert np.bincount(shown).tolist() == [12] * 5  # 60 shown: twelve turns of five, across the ends of epochs
    assert [sorted(turn) for turn in shown.reshape(12, 5).tolist()] == [list(range(5))] * 12
    shorter = EpochSampler(labels, 2, "shuffled", 0, length=2)
    assert np.bincount(np.concatenate([shorter.batches(e)[0] for e in range(5)])).tolist() == [2] * 5


def test_draws_are_balanced_over_groups_whatever_their_sizes_and_the_length() -> None:
    groups = np.array([0] * 50 + [1] * 5 + [3] * 1)  # nobody is of group 2
    epochs = EpochSampler(groups, 100, "balanced", 7, length=6000)
    (shown,) = (np.concatenate(epochs.batches(epoch)) for epoch in range(1))
    assert len(shown) == 6000
    counts = np.bincount(groups[shown], minlength=4)
    assert counts[2] == 0
    assert counts[[0, 1, 3]] == pytest.approx(2000, abs=5 * np.sqrt(6000 * 2 / 9))  # five standard deviations
    assert np.bincount(shown, minlength=56)[50:55] == pytest.approx(400, abs=100)
