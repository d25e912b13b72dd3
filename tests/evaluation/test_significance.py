import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from potstill.errors import UsageError
from potstill.evaluation.significance import (
    bootstrap_interval,
    gap_closed,
    mcnemar,
    paired_bootstrap,
    seeds_bootstrap,
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


def test_paired_bootstrap_agrees_with_resampling_images():
    a, b = cells(150, 12, 25, 13)
    gain, low, high = paired_bootstrap(a, b)
    assert gain == pytest.approx(13 / 200)
    rng = np.random.default_rng(1)
    slow = [np.mean(b[chosen]) - np.mean(a[chosen]) for chosen in rng.integers(0, 200, (10_000, 200))]
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.006)
    # and with the normal approximation of a difference of paired shares
    half = 1.96 * np.sqrt((37 - 13**2 / 200) / 200**2)
    assert (low, high) == pytest.approx((13 / 200 - half, 13 / 200 + half), abs=0.006)


def test_pairing_narrows_the_interval():
    a, b = cells(100, 0, 4, 96)
    paired = paired_bootstrap(a, b)
    shuffled = paired_bootstrap(a, np.random.default_rng(0).permutation(b))
    assert paired.low >= 0
    assert shuffled.high - shuffled.low > 3 * (paired.high - paired.low)


def test_bootstrap_interval_of_one_model():
    value, low, high = bootstrap_interval(np.array([True] * 90 + [False] * 10))
    assert value == pytest.approx(0.9)
    expected = stats.binom.ppf([0.025, 0.975], 100, 0.9) / 100
    assert (low, high) == pytest.approx(tuple(expected), abs=0.011)


def test_the_seed_decides():
    a, b = cells(300, 31, 47, 22)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert bootstrap_interval(a, seed=3) == bootstrap_interval(a, seed=3)
    draws = {paired_bootstrap(a, b, n=101, seed=seed).low for seed in range(8)}
    assert len(draws) > 1


def test_equal_models_gain_nothing():
    a, _ = cells(5, 0, 0, 3)
    assert paired_bootstrap(a, a) == (0, 0, 0)
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


@pytest.mark.parametrize("function", [paired_bootstrap, mcnemar, seeds_summary])
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


def test_bootstrap_over_seeds_is_that_of_their_mean_gain():
    a, b = seeds()
    gain, low, high = seeds_bootstrap(a, b)
    of_image = b.mean(axis=0) - a.mean(axis=0)
    assert gain == pytest.approx(of_image.mean())
    random = np.random.default_rng(1)
    slow = of_image[random.integers(0, 60, (10_000, 60))].mean(axis=1)
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.006)
    single = paired_bootstrap(a[0], b[0])
    assert seeds_bootstrap(a[:1], b[:1]) == pytest.approx(single, abs=0.02)


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
    teacher = np.arange(100) < 90
    baseline, distilled = (np.arange(100) < right for right in (60, 75))
    (gap, low, high), closed = gap_closed(teacher, baseline[None], distilled[None])
    assert gap == pytest.approx(0.3)
    assert closed is not None
    assert closed.value == pytest.approx(0.5)
    random = np.random.default_rng(1)
    draws = random.integers(0, 100, (10_000, 100))
    leads = teacher[draws].mean(axis=1) - baseline[draws].mean(axis=1)
    shares = (distilled[draws].mean(axis=1) - baseline[draws].mean(axis=1)) / leads
    assert (low, high) == pytest.approx(tuple(np.percentile(leads, [2.5, 97.5])), abs=0.011)
    assert (closed.low, closed.high) == pytest.approx(tuple(np.percentile(shares, [2.5, 97.5])), abs=0.02)


def test_a_gap_that_may_be_luck_has_no_share():
    teacher, baseline = cells(90, 4, 5, 1)[::-1]
    assert gap_closed(teacher, baseline[None], baseline[None]).closed is None
    few = np.arange(100) < 84  # 4 images and none the other way: the percentiles exclude 0, a fair coin does not
    assert gap_closed(few, (np.arange(100) < 80)[None], few[None]).closed is None
