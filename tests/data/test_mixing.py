import numpy as np
import pytest
import torch
from scipy import stats

from potstill.data.draws import uniform, words
from potstill.data.mixing import Mixing, cutmix_box
from potstill.types import Batch


def batch(count: int = 6, side: int = 8, classes: int = 3) -> Batch:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    index = torch.arange(count)
    return Batch(images, index % classes, index, torch.zeros_like(index))


def test_mixup_by_a_slow_reference() -> None:
    given = batch()
    found = Mixing(mixup=1.0, cutmix=0, classes=3, seed=5)(given, 2, 7)
    share = uniform(5, "mix share", np.array([7]), 2)[0]  # Beta(1, 1) is uniform
    order = np.argsort(words(5, "mix order", 7 * 2**20 + np.arange(6), 2))
    assert sorted(order) == list(range(6))
    for i in range(6):
        expected = share * given.images[i].double() + (1 - share) * given.images[order[i]].double()
        torch.testing.assert_close(found.images[i].double(), expected, atol=1e-6, rtol=0)
        soft = np.zeros(3)
        soft[given.labels[i]] += share
        soft[given.labels[order[i]]] += 1 - share
        assert found.soft_labels[i].tolist() == pytest.approx(soft.tolist())
        larger = i if share >= 0.5 else order[i]
        assert found.labels[i] == given.labels[larger]
    assert found.soft_labels.dtype == torch.float32
    assert torch.equal(found.index, given.index)
    assert torch.equal(given.images, batch().images)  # what came in is left alone


def test_labels_are_those_of_the_larger_share() -> None:
    given = Batch(torch.zeros(4, 3, 2, 2), torch.arange(4))
    mixing = Mixing(mixup=1.0, cutmix=0, classes=4, seed=0)
    for step in range(20):
        found = mixing(given, 0, step)
        assert torch.equal(found.soft_labels.argmax(dim=1), found.labels)
        assert found.soft_labels.sum(dim=1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    mixing = Mixing(mixup=alpha, cutmix=0, classes=2, seed=0)
    given = Batch(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), torch.tensor([0, 1]))
    shares = []
    for step in range(1500):
        images = mixing(given, 0, step).images
        if mixing.order(2, 0, step)[0] == 1:  # not mixed with itself
            shares.append(images[0, 0, 0, 0].item())
    assert len(shares) > 600
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_boxes_worked_by_hand() -> None:
    assert cutmix_box(8, 8, 0.75, (0.5, 0.5)) == (2, 6, 2, 6)  # sqrt(1/4) of 8 is 4, around (4, 4)
    assert cutmix_box(8, 8, 0.75, (0.99, 0.0)) == (5, 8, 0, 2)  # around (7, 0), cut at the border
    assert cutmix_box(10, 20, 0.36, (0.5, 0.5)) == (1, 9, 2, 18)  # .8 of each side
    assert cutmix_box(8, 8, 1.0, (0.5, 0.5)) == (4, 4, 4, 4)
    assert cutmix_box(8, 8, 0.0, (0.5, 0.5)) == (0, 8, 0, 8)


def test_cutmix_pastes_the_box_and_shares_by_area() -> None:
    given = Batch(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 8, 8).contiguous(), torch.arange(5))
    mixing, sizes = Mixing(mixup=0, cutmix=1.0, classes=5, seed=3), set()
    for step in range(30):
        found, order = mixing(given, 1, step), mixing.order(5, 1, step)
        for i in range(5):
            own, other = (found.images[i] == i), (found.images[i] == order[i])
            assert (own | other).all()
            pasted = other[0] & ~own[0]
            area = int(pasted.sum())
            rows, columns = pasted.any(dim=1).sum(), pasted.any(dim=0).sum()
            assert area == rows * columns  # one rectangle
            soft = np.zeros(5)
            if order[i] != i:
                sizes.add(area)
                soft[[i, int(order[i])]] = [1 - area / 64, area / 64]
                assert found.soft_labels[i].tolist() == pytest.approx(soft.tolist())
                assert found.labels[i] == (i if area <= 32 else order[i])
    assert len(sizes) > 8


def test_both_are_used_with_equal_chance_one_a_batch() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, classes=2, seed=0)
    given = Batch(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1]))
    blended = pasted = 0
    for step in range(1000):
        images = mixing(given, 0, step).images
        between = ((images > 0) & (images < 1)).float().mean()
        assert between in (0, 1)
        blended += int(between == 1)
        pasted += int(between == 0 and bool((images[0] > 0).any()) and not bool((images[0] > 0).all()))
    assert 200 < blended < 300  # half of the thousand, and half of these mix the two with each other
    assert 150 < pasted < 300


def test_another_step_epoch_or_seed_is_another_mixture() -> None:
    given = batch()
    first = Mixing(mixup=0.8, cutmix=0, classes=3, seed=5)(given, 2, 7)
    again = Mixing(mixup=0.8, cutmix=0, classes=3, seed=5)(given, 2, 7)
    assert torch.equal(first.images, again.images)
    for seed, epoch, step in ((6, 2, 7), (5, 3, 7), (5, 2, 8)):
        other = Mixing(mixup=0.8, cutmix=0, classes=3, seed=seed)(given, epoch, step)
        assert not torch.equal(first.images, other.images)
