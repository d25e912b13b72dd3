import numpy as np
import pytest
import torch
from scipy import stats

from potstill.data.augment import BatchMixer, MixParams, cutmix_boxes
from potstill.data.samplers import uniform

LABELS = np.arange(30) % 3


def mixing(**options: object) -> BatchMixer:
    return BatchMixer(**({"labels": LABELS, "mixup": 0, "cutmix": 0, "classes": 3, "size": 8, "seed": 5} | options))


def test_mixup_by_a_slow_reference() -> None:
    maker, ids = mixing(mixup=1.0), np.array([4, 9, 4, 20])
    generator = torch.Generator().manual_seed(0)
    own, others = (torch.rand(4, 3, 8, 8, generator=generator) for _ in range(2))
    drawn = maker.draw(ids, 2)
    images = maker.images(own, others, drawn)
    own_labels, other_labels = (torch.from_numpy(LABELS[each]) for each in (ids, drawn.partners))
    labels, soft = maker.labels(own_labels, other_labels, drawn)
    for i, sample in enumerate(ids):
        one = np.array([sample])
        assert drawn.partners[i] == int(uniform(5, "mix partner", one, 2)[0] * 30)
        share = uniform(5, "mix share", one, 2)[0]  # Beta(1, 1) is uniform
        expected = share * own[i].double() + (1 - share) * others[i].double()
        torch.testing.assert_close(images[i].double(), expected, atol=1e-6, rtol=0)
        shares = np.zeros(3)
        shares[own_labels[i]] += share
        shares[other_labels[i]] += 1 - share
        assert soft[i].tolist() == pytest.approx(shares.tolist())
        assert labels[i] == (own_labels if share >= 0.5 else other_labels)[i]
    assert soft.dtype == images.dtype == torch.float32
    assert torch.equal(images[0], own[0] * drawn.weights[0] + others[0] * (1 - drawn.weights[0]))  # exact in float32


def test_partners_are_any_images_or_of_any_class_where_that_is_asked() -> None:
    labels = np.array([0] * 5 + [1] * 95 + [3] * 900)
    ids = np.arange(1000).repeat(4)
    views = np.tile(np.arange(4), 1000)
    plain = mixing(labels=labels, mixup=1.0).draw(ids, views).partners
    assert plain.min() == 0
    assert plain.max() == 999
    assert stats.chisquare(np.bincount(plain // 50, minlength=20)).pvalue > 0.01
    balanced = mixing(labels=labels, mixup=1.0, balanced=True).draw(ids, views).partners
    assert np.bincount(labels[balanced]) / 4000 == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.03)
    assert set(balanced[balanced < 5]) == {0, 1, 2, 3, 4}
    assert stats.chisquare(np.bincount(balanced[balanced < 5], minlength=5)).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_each_image_has_a_share_of_its_own_from_the_beta_distribution(alpha: float) -> None:
    shares = mixing(mixup=alpha).draw(np.arange(2000), 0).weights
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_boxes_worked_by_hand() -> None:
    shares, rows, columns = (
        np.array(each) for each in ([0.75, 0.75, 1.0, 0.0, 0.36], [0.5, 0.99, 0.5, 0.5, 0.5], [0.5, 0, 0.5, 0.5, 0.9])
    )
    assert cutmix_boxes(8, shares, rows, columns).tolist() == [
        [2, 6, 2, 6],  # sqrt(1/4) of 8 is 4, around (4, 4)
        [5, 8, 0, 2],  # around (7, 0), cut at the border
        [4, 4, 4, 4],
        [0, 8, 0, 8],
        [1, 7, 4, 8],  # sqrt(.64) of 8 is 6.4: 3 to each side of (4, 7)
    ]
    assert cutmix_boxes(20, shares[4:], rows[4:], columns[:1]).tolist() == [[2, 18, 2, 18]]


def test_cutmix_pastes_a_box_for_each_image_and_shares_by_area() -> None:
    maker, ids = mixing(cutmix=1.0), np.arange(200)
    own, others = torch.full((200, 3, 8, 8), -1.5), torch.full((200, 3, 8, 8), 2.5)
    drawn = maker.draw(ids, 1)
    images = maker.images(own, others, drawn)
    _, soft = maker.labels(torch.zeros(200, dtype=torch.int64), torch.ones(200, dtype=torch.int64), drawn)
    areas = set()
    for i, (top, bottom, left, right) in enumerate(drawn.boxes):
        expected = own[i].clone()
        expected[:, top:bottom, left:right] = 2.5
        assert torch.equal(images[i], expected)
        area = (bottom - top) * (right - left)
        areas.add(int(area))
        assert soft[i].tolist() == pytest.approx([1 - area / 64, area / 64, 0])
    assert len(areas) > 10


def test_probabilities_of_a_teacher_are_mixed_as_the_images_are() -> None:
    share = np.array([0.9, 0.25])
    params = MixParams(np.array([1, 0]), share, np.array([True, True]), np.zeros((2, 4), np.int64))
    own, others = torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([[0.3, 0.7], [0.1, 0.9]])
    logits = (each.log()[:, :, None, None] + 3.0 for each in (own, others))  # a constant changes no probability
    mixed = mixing(mixup=1.0).answers(*logits, params).softmax(1).squeeze()
    by_hand = [[0.9 * 0.8 + 0.1 * 0.3, 0.9 * 0.2 + 0.1 * 0.7], [0.25 * 0.5 + 0.75 * 0.1, 0.25 * 0.5 + 0.75 * 0.9]]
    torch.testing.assert_close(mixed, torch.tensor(by_hand), atol=1e-6, rtol=0)


def test_labels_are_those_of_the_larger_share() -> None:
    shares = np.array([0.5, 0.499, 0.9, 0.1])
    drawn = MixParams(np.arange(4), shares, np.ones(4, dtype=bool), np.zeros((4, 4), dtype=np.int64))
    labels, soft = mixing(mixup=1.0).labels(torch.tensor([0, 0, 0, 2]), torch.tensor([1, 1, 0, 2]), drawn)
    assert labels.tolist() == [0, 1, 0, 2]
    assert soft.sum(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert soft[2:].tolist() == [[1, 0, 0], [0, 0, 1]]  # shares of one class add up


def test_both_are_used_with_equal_chance_one_an_image() -> None:
    maker = mixing(mixup=0.2, cutmix=3.0)
    drawn = maker.draw(np.arange(4000), 0)
    assert 0.46 < drawn.is_mixup.mean() < 0.54
    # each with its own alpha
    assert stats.kstest(drawn.weights[drawn.is_mixup], stats.beta(0.2, 0.2).cdf).pvalue > 0.01
    assert drawn.weights[~drawn.is_mixup].std() < 0.25 < drawn.weights[drawn.is_mixup].std()
    images = maker.images(torch.zeros(4000, 3, 8, 8), torch.ones(4000, 3, 8, 8), drawn)
    between = ((images > 0) & (images < 1)).float().mean(dim=(1, 2, 3))
    assert set(between.tolist()) <= {0.0, 1.0}
    assert not between[torch.from_numpy(~drawn.is_mixup)].any()


def test_a_mixture_is_a_function_of_seed_sample_and_view_alone() -> None:
    def rows(drawn: MixParams) -> list[tuple[object, ...]]:
        return list(zip(drawn.partners, drawn.weights, drawn.is_mixup, map(tuple, drawn.boxes), strict=True))

    ids = np.arange(30)
    maker = mixing(mixup=0.8, cutmix=1.0)
    together = rows(maker.draw(ids, 7))
    assert together == rows(mixing(mixup=0.8, cutmix=1.0).draw(ids, np.full(30, 7)))
    assert together[::-1] == rows(maker.draw(ids[::-1], 7))
    assert together[11:12] == rows(maker.draw(ids[11:12], 7))
    alternating = rows(maker.draw(ids, np.where(ids % 2 == 0, 7, 8)))
    assert alternating[::2] == together[::2]
    for other in (maker.draw(ids, 8), mixing(mixup=0.8, cutmix=1.0, seed=6).draw(ids, 7), maker.draw(ids + 30, 7)):
        assert sum(a == b for a, b in zip(rows(other), together, strict=True)) <= 1
