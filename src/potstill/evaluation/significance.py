"""Whether a difference between two models is more than luck.  Needs no torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array


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


def _interval(value: float, resampled: Array) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _deviation(values: Array) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
