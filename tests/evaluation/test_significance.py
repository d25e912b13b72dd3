import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from potstill.errors import UsageError
from potstill.evaluation.significance import (
    crossed_interval,
    gap_closed,
    interim_confidence,
    mcnemar,
    paired_interval,
    paired_loss_bound,
    seeds_summary,
    sign_flip,
    wilson_interval,
)


def cells(both, only_a, only_b, none):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * none
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * none
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [*itertools.product([0, 1, 2, 7], [0, 1, 5, 12]), (40, 61), (700, 640), (3000, 3000)]
)
def test_mcnemar_equals_the_binomial_test(only_a, only_b):
    result = mcnemar(*cells(10, only_a, only_b, 5))
    assert (result["fixed"], result["broken"]) == (only_b, only_a)
    expected = stats.binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert result["p"] == pytest.approx(expected, rel=1e-9)


def test_paired_interval_by_hand():
    """25 newly right, 12 newly wrong of 200: with one more of each, 13 / 202 and (39 / 202 - (13 / 202)^2) / 202."""
    gain, low, high = paired_interval(*cells(150, 12, 25, 13))
    assert gain == pytest.approx(13 / 200)
    half = 1.959964 * np.sqrt((39 / 202 - (13 / 202) ** 2) / 202)
    assert (low, high) == pytest.approx((13 / 202 - half, 13 / 202 + half), abs=1e-6)


def test_loss_bound_by_hand():
    for images in (9, 231, 1000):  # the bound of 0 of n by the score test
        assert paired_loss_bound(0, 0, images) == pytest.approx(2.705543 / (images + 2.705543), abs=1e-6)
        assert paired_loss_bound(0, 0, images, 0.99) == pytest.approx(5.411894 / (images + 5.411894), abs=1e-6)
    for lost in (1, 7, 40):  # without gains, Wilson's bound of a single share
        share, z2 = lost / 300, 2.705543
        half = np.sqrt(z2 * share * (1 - share) / 300 + z2**2 / 300**2 / 4)
        assert paired_loss_bound(lost, 0, 300) == pytest.approx((share + z2 / 600 + half) / (1 + z2 / 300), abs=1e-6)
    assert paired_loss_bound(40, 40, 400) == pytest.approx(1.644854 * np.sqrt(80) / 400, rel=0.01)  # Wald's
    assert paired_loss_bound(0, 5, 400) < paired_loss_bound(0, 0, 400)
    with pytest.raises(UsageError, match="needs images"):
        paired_loss_bound(3, 3, 5)


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.0), (0.03, 0.02), (0.06, 0.01), (0.15, 0.1)])
@pytest.mark.parametrize("images", [300, 2000])
def test_loss_bound_misses_in_about_five_percent(lost, gained, images):
    """Reference: draws of images that change with known chances."""
    draws = np.random.default_rng(0).multinomial(images, [lost, gained, 1 - lost - gained], size=20_000)
    found, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    misses = sum(
        count
        for (a, b), count in zip(found.tolist(), counts.tolist(), strict=True)
        if paired_loss_bound(a, b, images) < lost - gained
    )
    assert 0.02 < misses / 20_000 < 0.062


@pytest.mark.parametrize("chances", [(0.02, 0.02), (0.06, 0.03), (0.3, 0.1)])
def test_paired_intervals_hold_the_truth(chances):
    """4,000 draws of 360 images: 92 to 98 % of the intervals."""
    counts = np.random.default_rng(0).multinomial(360, [*chances, 1 - sum(chances)], 4000)
    truth = chances[0] - chances[1]
    held = [low <= truth <= high for _, low, high in (paired_interval(*cells(0, b, f, n)) for f, b, n in counts)]
    assert 0.92 <= np.mean(held) <= 0.98


def test_pairing_narrows_the_interval():
    a, b = cells(100, 0, 8, 96)
    paired = paired_interval(a, b)
    shuffled = paired_interval(a, np.random.default_rng(0).permutation(b))
    assert paired.low >= 0
    assert shuffled.high - shuffled.low > 2 * (paired.high - paired.low)


def test_equal_models_gain_nothing():
    a, _ = cells(5, 0, 0, 3)
    gain, low, high = paired_interval(a, a)
    assert gain == 0
    assert low < 0 < high  # eight images do not show that there is no difference
    assert mcnemar(a, a) == {"fixed": 0, "broken": 0, "p": 1.0}


def test_seeds_are_compared_pair_by_pair():
    a, b = [0.80, 0.82, 0.79, 0.85], [0.83, 0.84, 0.83, 0.86]
    summary = seeds_summary(a, b)
    test = stats.ttest_rel(b, a)
    interval = test.confidence_interval(0.95)
    assert summary["n"] == 4
    assert summary["mean_a"] == pytest.approx(0.815)
    assert summary["sd_a"] == pytest.approx(np.sqrt((0.015**2 + 0.005**2 + 0.025**2 + 0.035**2) / 3))
    assert summary["sd_b"] == pytest.approx(np.std(b, ddof=1))
    assert summary["difference"] == pytest.approx(0.025)
    assert summary["difference_sd"] == pytest.approx(np.std([0.03, 0.02, 0.04, 0.01], ddof=1))
    assert (summary["difference_low"], summary["difference_high"]) == pytest.approx((interval.low, interval.high))


def test_one_seed_has_no_deviation():
    summary = seeds_summary([0.5], [0.75])
    assert summary["difference"] == 0.25
    assert [name for name, value in summary.items() if value is None] == [
        "sd_a",
        "sd_b",
        "difference_sd",
        "difference_low",
        "difference_high",
    ]


@pytest.mark.parametrize("function", [paired_interval, mcnemar, seeds_summary])
def test_unequal_lengths_and_nothing_are_refused(function):
    for a, b in [([True], [True, False]), ([], [])]:
        with pytest.raises(UsageError, match="needs the same"):
            function(np.array(a), np.array(b))


def test_needs_no_torch():
    code = "import sys, potstill.evaluation.significance; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (5, 5), (9, 10), (180, 270), (1, 1)])
def test_wilson_is_scipys(correct, count):
    expected = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, count) == pytest.approx((correct / count, expected.low, expected.high), abs=1e-9)


def seeds(count=3, images=60, seed=0):
    random = np.random.default_rng(seed)
    a = random.random((count, images)) < 0.6
    b = a ^ (random.random((count, images)) < 0.25)
    return a, b | (random.random((count, images)) < 0.1)


def test_crossed_interval_by_the_analysis_of_variance():
    """The variance from sums of squares, cell by cell; its critical value from the share of the seeds."""
    a, b = seeds(5, 40)
    b[:, :8] = ~a[:, :8]  # images on which all seeds differ, so that images have a part in the variance
    gains = b.astype(float) - a
    whole = gains.mean()
    rows, columns = gains.mean(axis=1), gains.mean(axis=0)
    between_seeds = 40 * sum((row - whole) ** 2 for row in rows) / 4
    between_images = 5 * sum((column - whole) ** 2 for column in columns) / 39
    rest = sum((gains[s, i] - rows[s] - columns[i] + whole) ** 2 for s, i in itertools.product(range(5), range(40))) / (
        4 * 39
    )
    variance = (between_seeds + between_images - rest) / 200
    share = between_seeds / 200 / variance
    critical = 1.959964 + share**1.8 * (stats.t.ppf(0.975, 4) - 1.959964)
    found = crossed_interval(a, b)
    assert found.value == pytest.approx(whole)
    assert found.seed_share == pytest.approx(share)
    assert (found.low, found.high) == pytest.approx(
        (whole - critical * variance**0.5, whole + critical * variance**0.5), abs=1e-6
    )


def test_p_is_the_level_at_which_the_interval_reaches_0():
    a, b = seeds(4, 300, seed=3)
    p = crossed_interval(a, b).p
    at = crossed_interval(a, b, confidence=1 - p)
    assert min(abs(at.low), abs(at.high)) == pytest.approx(0, abs=1e-6)
    assert 1e-6 < p < 1


def test_seeds_that_agree_on_few_images_are_not_sure():
    """Five of 100 images newly right with each of three seeds: a fair coin does that in one of 16 cases."""
    none = np.zeros((3, 100), dtype=bool)
    five = none.copy()
    five[:, :5] = True
    assert crossed_interval(none, five).p == pytest.approx(1 / 16)
    equal = crossed_interval(none, none)
    assert equal.p == 1
    assert equal.low < 0 < equal.high


def test_one_seed_has_no_interval_over_seeds():
    a, b = seeds(1)
    with pytest.raises(UsageError, match="two seeds or more"):
        crossed_interval(a, b)


def test_later_looks_spend_less():
    spent = [1 - interim_confidence(look) for look in range(1, 60)]
    assert spent[0] == pytest.approx(0.05)
    assert sum(spent[1:]) <= 0.01 + 1e-9
    assert spent == sorted(spent, reverse=True)


def test_sign_flip_of_one_seed_is_mcnemar():
    for only_a, only_b in ((0, 0), (3, 0), (5, 12), (40, 61), (700, 640)):
        a, b = cells(10, only_a, only_b, 5)
        assert sign_flip(a[None], b[None]) == pytest.approx(mcnemar(a, b)["p"], rel=1e-6)


def test_sign_flip_counts_all_ways():
    a, b = seeds(3, 11, seed=4)
    gains = b.sum(axis=0).astype(int) - a.sum(axis=0)
    sums = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True))) for signs in itertools.product([1, -1], repeat=11)
    ]
    expected = np.mean([value >= abs(gains.sum()) for value in sums])
    assert 0 < expected < 1
    assert sign_flip(a, b) == pytest.approx(expected)


def test_sign_flip_is_scipys_permutation_test():
    a, b = seeds(2, 40, seed=2)
    gains = b.sum(axis=0).astype(float) - a.sum(axis=0)
    found = stats.permutation_test(
        (gains,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    assert sign_flip(a, b) == pytest.approx(found.pvalue, abs=0.015)


def test_gap_closed_by_hand_and_by_resampling():
    teacher = np.arange(400) < 360
    baseline, distilled = (np.arange(400) < right for right in (240, 300))
    (gap, low, high), closed = gap_closed(teacher, baseline[None], distilled[None])
    assert gap == pytest.approx(0.3)
    assert closed is not None
    assert closed.value == pytest.approx(0.5)
    draws = np.random.default_rng(1).integers(0, 400, (10_000, 400))
    leads = teacher[draws].mean(axis=1) - baseline[draws].mean(axis=1)
    shares = (distilled[draws].mean(axis=1) - baseline[draws].mean(axis=1)) / leads
    assert (low, high) == pytest.approx(tuple(np.percentile(leads, [2.5, 97.5])), abs=0.011)
    assert (closed.low, closed.high) == pytest.approx(tuple(np.percentile(shares, [2.5, 97.5])), abs=0.02)


def test_gap_closed_over_seeds_holds_the_truth():
    """Students of 70 and 80 % beside a teacher of 90 %, seeds that differ: the true share is one half."""
    random, held, repeats = np.random.default_rng(0), 0, 400
    for _ in range(repeats):
        hard = random.random(1500)
        baseline, distilled = (
            hard + random.normal(0, 0.02, (4, 1)) + random.normal(0, 0.1, (4, 1500)) < bar for bar in (0.7, 0.8)
        )
        closed = gap_closed(hard < 0.9, baseline, distilled).closed
        truth = 0.5
        held += closed is not None and closed.low <= truth <= closed.high
    assert 0.92 <= held / repeats <= 0.98


def test_a_gap_that_may_be_luck_has_no_share():
    teacher, baseline = cells(90, 4, 5, 1)[::-1]
    assert gap_closed(teacher, baseline[None], baseline[None]).closed is None
    few = np.arange(100) < 84  # 4 images and none the other way: the percentiles exclude 0, a fair coin does not
    assert gap_closed(few, (np.arange(100) < 80)[None], few[None]).closed is None
