"""Whether a difference between two models is more than luck.  Needs no torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array

Z_975 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(correct: Array, n: int = 10_000, seed: int = 0) -> Interval:
    """Accuracy of one model, with its bootstrap percentile interval over images.

    Args:
        correct: [N] bool, whether each image was classified correctly.
        n: resamples.
        seed: of the resampling.

    Raises:
        UsageError: no images.
    """
    count = _images(correct)
    # An image is right or wrong, so a resample is known by how many right ones it holds: a binomial number.
    share = float(np.mean(correct))
    return _interval(share, np.random.default_rng(seed).binomial(count, share, n) / count)


def paired_bootstrap(correct_a: Array, correct_b: Array, n: int = 10_000, seed: int = 0) -> Interval:
    """Gain in accuracy of b over a on the same images, with its bootstrap percentile interval over images.

    Args:
        correct_a: [N] bool, the model compared with (the baseline).
        correct_b: [N] bool, the model that is judged (the distilled student), for the same images.
        n: resamples.
        seed: of the resampling.

    Returns:
        ``accuracy(b) - accuracy(a)``, low, high.

    Raises:
        UsageError: no images, or different numbers of them.
    """
    count = _images(correct_a, correct_b)
    fixed, broken = _cells(correct_a, correct_b)
    # Only four kinds of images exist (both right, only a, only b, none): resampling images is resampling these counts.
    shares = np.array([fixed, broken, count - fixed - broken]) / count
    cells = np.random.default_rng(seed).multinomial(count, shares, n)
    return _interval((fixed - broken) / count, (cells[:, 0] - cells[:, 1]) / count)


def mcnemar(correct_a: Array, correct_b: Array) -> dict[str, float | int]:
    """McNemar's exact test: could images that only one of two models gets right have fallen either way by chance?

    Args:
        correct_a: [N] bool, the model compared with (the baseline).
        correct_b: [N] bool, the model that is judged, for the same images.

    Returns:
        ``fixed``: images that a gets wrong and b right; ``broken``: the reverse; ``p``: two-sided binomial probability.

    Example:
        >>> mcnemar(np.array([True, False, False, False]), np.array([True, True, True, True]))
        {'fixed': 3, 'broken': 0, 'p': 0.25}
    """
    _images(correct_a, correct_b)
    fixed, broken = _cells(correct_a, correct_b)
    trials = fixed + broken
    ways, below = 1, 0
    for successes in range(min(fixed, broken) + 1):
        below += ways  # whole numbers of any size: nothing is rounded before the one division
        ways = ways * (trials - successes) // (successes + 1)
    return {"fixed": fixed, "broken": broken, "p": min(1.0, 2 * below / 2**trials)}


def wilson_interval(correct: int, count: int) -> Interval:
    """A share of ``count`` images with Wilson's 95 % score interval, which holds for few images and shares near 0 or 1.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Raises:
        UsageError: no images, or more right ones than images.

    Example:
        >>> print("{:.3f} {:.3f} {:.3f}".format(*wilson_interval(9, 10)))
        0.900 0.596 0.982
    """
    if not 0 <= correct <= count or not count:
        raise UsageError(f"a share needs images, and no more right ones than images; got {correct} of {count}")
    share, z2 = correct / count, Z_975**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def seeds_bootstrap(correct_a: Array, correct_b: Array, n: int = 10_000, seed: int = 0) -> Interval:
    """Gain in accuracy of b over a, mean over seeds, with its bootstrap percentile interval over images.

    Args:
        correct_a: [S, N] bool, row i: the model compared with, of seed i.
        correct_b: [S, N] bool, the model that is judged, of the same seeds, for the same images.
        n: resamples.
        seed: of the resampling.

    Raises:
        UsageError: no images, or different numbers of seeds or images.
    """
    gains, seeds = _gains(correct_a, correct_b)
    # An image's gain is one of 2 S + 1 numbers: resampling images is resampling how many have each.
    counts = np.bincount(gains + seeds, minlength=2 * seeds + 1)
    drawn = np.random.default_rng(seed).multinomial(len(gains), counts / len(gains), n)
    steps = np.arange(-seeds, seeds + 1)
    return _interval(float(gains.mean()) / seeds, drawn @ steps / (seeds * len(gains)))


def sign_flip(correct_a: Array, correct_b: Array) -> float:
    """Could the gain over several seeds have fallen either way by chance?  Exact, over images; two-sided.

    Under the null hypothesis either method is as likely to be the better one on an image, by whatever number of seeds:
    the probability of a sum of gains as far from 0 as this one, over all ways to flip their signs.  With one seed this
    is McNemar's exact test.

    Args:
        correct_a: [S, N] bool, row i: the model compared with, of seed i.
        correct_b: [S, N] bool, the model that is judged, of the same seeds, for the same images.

    Example:
        >>> a, b = np.zeros((2, 3), dtype=bool), np.array([[True, True, False], [True, False, False]])
        >>> sign_flip(a, b)  # gains 2, 1, 0: of the sums 3, 1, -1, -3 two are as far from 0
        0.5
    """
    gains, seeds = _gains(correct_a, correct_b)
    by_size = np.bincount(np.abs(gains), minlength=seeds + 1)
    chances = np.ones(1)  # of the sums -top, -top + 2, ..., top, as far as they have been added
    for size, images in enumerate(by_size.tolist()):
        if size and images:
            coins = np.zeros(size * images + 1)
            coins[::size] = _fair_coins(images)
            chances = np.convolve(chances, coins)
    top = len(chances) - 1
    sums = np.arange(-top, top + 1, 2)
    return float(min(1.0, chances[np.abs(sums) >= abs(int(gains.sum()))].sum()))


class Closed(NamedTuple):
    """How far the teacher leads the baseline, and how much of that the student has made up, with 95 % intervals."""

    gap: Interval  # accuracy(teacher) - accuracy(baseline)
    closed: Interval | None  # share of it; None where the gap may be none: a share of nothing is anything


def gap_closed(teacher: Array, baseline: Array, distilled: Array, n: int = 10_000, seed: int = 0) -> Closed:
    """The gap and the share of it that is closed, with bootstrap percentile intervals over images.

    Args:
        teacher: [N] bool, whether each image was classified correctly.
        baseline: [S, N] bool, a row for each seed.
        distilled: [S, N] bool, likewise, for the same images.
        n: resamples.
        seed: of the resampling.

    Raises:
        UsageError: no images, or different numbers of them.
    """
    _images(teacher, *baseline, *distilled)
    # One number for each kind of image: what it adds to the lead and to the gain (S times each, so whole numbers).
    seeds = len(baseline)
    lead = seeds * np.asarray(teacher, dtype=np.int64) - np.asarray(baseline, dtype=np.int64).sum(axis=0)
    gain, _ = _gains(baseline, distilled)
    kinds, counts = np.unique(np.stack([lead, gain], axis=1), axis=0, return_counts=True)
    images = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(images, counts / images, n)
    leads, gained = (drawn @ kinds[:, column] / (seeds * images) for column in (0, 1))
    gap = _interval(float(lead.mean()) / seeds, leads)
    repeated = np.broadcast_to(np.asarray(teacher, dtype=bool), np.shape(baseline))
    if gap.low <= 0 or sign_flip(baseline, repeated) >= 0.05:  # of few images the percentiles alone are too sure
        return Closed(gap, None)
    positive = leads > 0
    return Closed(gap, _interval(float(gain.sum() / lead.sum()), gained[positive] / leads[positive]))


def seeds_summary(a: Sequence[float], b: Sequence[float]) -> dict[str, float | int | None]:
    """One figure of two settings over the same seeds, compared seed by seed.

    Args:
        a: [n] the figure of the setting compared with.
        b: [n] that of the setting judged; entry i has the seed of ``a[i]``.

    Returns:
        ``n``; ``mean_a``, ``sd_a``, ``mean_b``, ``sd_b``; ``difference`` (mean of b - a), ``difference_sd``, and
        ``difference_low``, ``difference_high``, its 95 % interval by Student's t.  Deviations are those of a sample
        (n - 1); with one seed they and the interval are None.

    Raises:
        UsageError: no seeds, or different numbers of them.
    """
    if len(a) != len(b) or not len(a):
        raise UsageError(f"needs the same seeds for both settings, got {len(a)} and {len(b)} values")
    n = len(a)
    difference = np.subtract(b, a)
    mean, deviation = float(difference.mean()), _deviation(difference)
    low = high = None
    if deviation is not None:
        from scipy import stats  # type: ignore[import-untyped]  # here, since it takes half a second

        half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
        low, high = mean - half, mean + half
    return {
        "n": n,
        "mean_a": float(np.mean(a)),
        "sd_a": _deviation(np.asarray(a)),
        "mean_b": float(np.mean(b)),
        "sd_b": _deviation(np.asarray(b)),
        "difference": mean,
        "difference_sd": deviation,
        "difference_low": low,
        "difference_high": high,
    }


def _images(*columns: Array) -> int:
    counts = {len(column) for column in columns}
    if len(counts) != 1 or counts == {0}:
        raise UsageError(f"needs the same images for both models, got {[len(column) for column in columns]}")
    return counts.pop()


def _cells(correct_a: Array, correct_b: Array) -> tuple[int, int]:
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    return int((b & ~a).sum()), int((a & ~b).sum())


def _gains(correct_a: Array, correct_b: Array) -> tuple[Array, int]:
    """[S, N] bool, twice -> [N]: by how many seeds more b is right on an image; and S."""
    a, b = (np.atleast_2d(np.asarray(each, dtype=bool)) for each in (correct_a, correct_b))
    if a.shape != b.shape or not a.size:
        raise UsageError(f"needs the same seeds and images for both models, got {list(a.shape)} and {list(b.shape)}")
    return b.sum(axis=0, dtype=np.int64) - a.sum(axis=0, dtype=np.int64), len(a)


def _fair_coins(count: int) -> Array:
    """[count + 1]: the chance of 0, 1, ... heads; by logarithms, since 2 ** count is soon too large."""
    heads = np.arange(count + 1)
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    chances: Array = np.exp(logs[count] - logs[heads] - logs[count - heads] - count * math.log(2))
    return chances


def _interval(value: float, resampled: Array) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _deviation(values: Array) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
