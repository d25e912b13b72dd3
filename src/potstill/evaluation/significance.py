"""Whether a difference between two models is significant.  No torch here."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation import Array

Z_975 = 1.959963984540054  # 97.5 % quantile of the normal distribution
MIN_P_VALUE = 1e-12  # smaller ones are not resolved
MIN_CHANGED_IMAGES = 10  # with fewer, the normal approximation is too rough and the exact test counts too
_FOLD_CAUTION = 1.3  # of the variance between folds, which few folds rather underestimate; calibrated, as the exponents
_EXPONENTS = {2: 0.9, 3: 1.4}  # by number of seeds, calibrated to the nominal level; 1.8 for more


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def paired_interval(correct_a: Array, correct_b: Array) -> Interval:
    """Return the gain in accuracy of b over a, with its 95 % interval over images.

    The interval is Wald's with one image more that only a gets right and one that only b does, which holds for few
    changed images too.  Source: D. G. Bonett, R. M. Price, Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data, J. Educ. Behav. Stat. 37 (2012).

    Args:
        correct_a: [N] bool, for the reference (the baseline).
        correct_b: [N] bool, for the other model (the distilled student), on the same images.

    Returns:
        ``accuracy(b) - accuracy(a)``, low, high.

    Raises:
        UsageError: no images, or different numbers of them.
    """
    count = _count_images(correct_a, correct_b)
    only_b, only_a = _discordant_counts(correct_a, correct_b)
    middle = (only_b - only_a) / (count + 2)
    half = Z_975 * math.sqrt(max(0.0, (only_b + only_a + 2) / (count + 2) - middle**2) / (count + 2))
    return Interval((only_b - only_a) / count, max(-1.0, middle - half), min(1.0, middle + half))


def mean_interval(values: Array) -> Interval:
    """Return the mean of values, one for each image, with Student's 95 % interval over images.

    Raises:
        UsageError: fewer than two values.

    Example:
        >>> [round(each, 3) for each in mean_interval(np.array([0.5, 0.7, 0.9]))]  # t = 4.303, deviation 0.2
        [0.7, 0.203, 1.197]
    """
    from scipy import special

    if len(values) < 2:
        raise UsageError(f"an interval of a mean needs two images or more, got {len(values)}")
    half = float(special.stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return Interval(mean, mean - half, mean + half)


def paired_loss_bound(only_a: int, only_b: int, count: int, confidence: float = 0.95) -> float:
    """Return the upper end of the one-sided interval of the loss in accuracy of b against a, over images.

    It is the score interval, which holds for few changed images too.  Source: T. Tango, Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design, Stat. Med. 17 (1998).

    Args:
        only_a: images that only a, the reference, gets right.
        only_b: images that only b gets right.
        count: number of images.
        confidence: of the interval, in (0.5, 1).

    Raises:
        UsageError: no images, or fewer than those that changed.

    Example:
        >>> round(paired_loss_bound(0, 0, 1000), 5)  # with no image changed: z^2 / (n + z^2)
        0.0027
    """
    if min(only_a, only_b) < 0 or not count or only_a + only_b > count:
        raise UsageError(f"a loss needs images, and no more changed ones than images; got {only_a + only_b} of {count}")
    quantile = NormalDist().inv_cdf(confidence)
    low, high = (only_a - only_b) / count, 1.0
    for _ in range(60):  # bisect for the largest loss that is not rejected
        loss = (low + high) / 2
        linear = (2 * count - only_a + only_b) * loss - only_a - only_b
        root = math.sqrt(max(0.0, linear**2 + 8 * count * only_b * loss * (1 - loss)))
        only_b_share = max(0.0, (root - linear) / (4 * count))  # of greatest likelihood, given the loss
        variance = count * (2 * only_b_share + loss * (1 - loss))
        if count * loss - (only_a - only_b) > quantile * math.sqrt(max(0.0, variance)):
            high = loss
        else:
            low = loss
    return high


def mcnemar(correct_a: Array, correct_b: Array) -> dict[str, float | int]:
    """Run McNemar's exact test on the images that only one of two models gets right.

    Args:
        correct_a: [N] bool, for the reference (the baseline).
        correct_b: [N] bool, for the other model, on the same images.

    Returns:
        ``fixed``: images that only b gets right; ``broken``: images that only a gets right; ``p``: two-sided binomial
        probability.

    Example:
        >>> mcnemar(np.array([True, False, False, False]), np.array([True, True, True, True]))
        {'fixed': 3, 'broken': 0, 'p': 0.25}
    """
    _count_images(correct_a, correct_b)
    only_b, only_a = _discordant_counts(correct_a, correct_b)
    trials = only_b + only_a
    below = sum(math.comb(trials, successes) for successes in range(min(only_b, only_a) + 1))  # exact integers
    return {"fixed": only_b, "broken": only_a, "p": min(1.0, 2 * below / 2**trials)}


def wilson_interval(correct: int, count: int) -> Interval:
    """Return the accuracy with Wilson's 95 % score interval, which holds for few images and near 0 or 1.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Raises:
        UsageError: no images, or ``correct`` not in 0 to ``count``.

    Example:
        >>> print("{:.3f} {:.3f} {:.3f}".format(*wilson_interval(9, 10)))
        0.900 0.596 0.982
    """
    if not 0 <= correct <= count or not count:
        raise UsageError(f"a share needs images, and no more right ones than images; got {correct} of {count}")
    share = correct / count
    return Interval(share, *score_interval(share, count))


def score_interval(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval (low, high) of a share of ``count`` images, or of an effective number."""
    z2 = Z_975**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


class CrossedInterval(NamedTuple):
    """A mean gain with a confidence interval over seeds and images together."""

    value: float
    low: float
    high: float
    p: float  # two-sided
    confidence: float  # of the interval, e.g. 0.95
    seed_share: float  # share of the variance of the mean gain that is due to seeds, or to folds and seeds, in [0, 1]


def crossed_interval(
    correct_a: Array, correct_b: Array, confidence: float = 0.95, folds: Array | None = None
) -> CrossedInterval:
    """Return the mean gain in accuracy of b over a, with an interval over seeds and images together.

    Seeds and images are crossed random effects: the gain on image i with seed s is the sum of a mean, a deviation of
    the seed, one of the image and one of the two together.  The analysis of variance gives the variance of the mean as
    ``(MS_seeds + MS_images - MS_rest) / (S N)``.  Its first part has S - 1 degrees of freedom, the rest many; the
    critical value lies between those of the normal distribution and of Student's t, by the share r of the seeds in that
    variance: ``z + r ** q * (t - z)``.  This is Cochran's rule with an exponent, chosen so that 4 to 6 % of the
    intervals at 95 % miss whatever the share is (``tests/evaluation/test_significance_false_alarms.py``;
    Satterthwaite's degrees of freedom: up to 7.8 % with three seeds).

    If fewer than ``MIN_CHANGED_IMAGES`` images differ, p is at least that of the exact test over images
    (``sign_flip``).

    With ``folds``, the models that predict the images of a fold were trained, with seeds of its own, on the images of
    the other folds; fold and seed are a cell.  Images are nested in folds: their part of the variance is that within
    folds.  What the means of the folds vary beyond it (times 1.3, as few folds rather underestimate it) is the part of
    the cells, with K - 1 degrees of freedom.  Seeds within a fold are independent, but the training sets of two folds
    share ``(K - 2) / (K - 1)`` of their images: what folds vary beyond images and seeds is multiplied by
    ``1 + K / (K - 1)``, the correction of C. Nadeau, Y. Bengio, Inference for the generalization error, Machine
    Learning 52 (2003), for a test set of 1 / (K - 1) of the training set.  It is not applied to the images, which no
    two folds share.  No estimate is unbiased, since the folds do not show what their training sets share (Y. Bengio, Y.
    Grandvalet, No unbiased estimator of the variance of K-fold cross-validation, JMLR 5, 2004):
    ``tests/evaluation/test_significance_folds.py`` counts 1 to 7 % of false alarms with 5 and 10 folds.

    Args:
        correct_a: [S, N] bool, row s: the reference with seed s; S >= 2, or one with ``folds``.
        correct_b: [S, N] bool, the other model with the same seeds, on the same images.
        confidence: level of the interval.
        folds: [N] fold of each image, from 0 to K - 1, K >= 2; None: no folds.

    Raises:
        UsageError: fewer than two seeds or folds, no images, or different numbers of seeds or images.
    """
    count = _gains_per_image(correct_a, correct_b)[1] if folds is None else int(folds.max()) + 1
    if count < 2:
        what = "seeds" if folds is None else "folds"
        raise UsageError(f"an interval over {what} needs two {what} or more, got one")
    difference = _differences(correct_a, correct_b)
    variance = _variance_components(difference, difference, folds)
    changed = int((difference != 0).any(axis=0).sum())
    value = float(difference.mean())
    error = math.sqrt(variance.total)
    half = _critical_value(variance, count, 1 - confidence) * error

    low, p = MIN_P_VALUE, 1.0
    for _ in range(40):  # bisect in logarithms for the level at which the interval just reaches 0
        level = math.sqrt(low * p)
        if _critical_value(variance, count, level) * error > abs(value):
            low = level
        else:
            p = level
    if changed < MIN_CHANGED_IMAGES:
        p = max(p, sign_flip(correct_a, correct_b))
    return CrossedInterval(value, max(-1.0, value - half), min(1.0, value + half), p, confidence, variance.share)


def interim_confidence(looks: int) -> float:
    """Return the confidence level for the ``looks``-th look at the test split (group sequential testing).

    Adding seeds because the first look was inconclusive gives chance another try.  The first look spends 5 %, the
    second 0.5 %, each further one half of that before: at most 6 % false alarms in all, whenever one stops.

    Example:
        >>> [interim_confidence(looks) for looks in (1, 2, 3)]
        [0.95, 0.995, 0.9975]
    """
    return 0.95 if looks <= 1 else 1 - 0.005 / 2 ** (looks - 2)


def sign_flip(correct_a: Array, correct_b: Array) -> float:
    """Return the two-sided p-value of the exact sign-flip test over images.

    Under the null hypothesis the sign of the gain on each image (summed over seeds) is random; p is the probability of
    a total gain at least as far from 0 over all sign flips.  With one seed this is McNemar's exact test.

    Args:
        correct_a: [S, N] bool, row s: the reference with seed s.
        correct_b: [S, N] bool, the other model with the same seeds, on the same images.

    Example:
        >>> a, b = np.zeros((2, 3), dtype=bool), np.array([[True, True, False], [True, False, False]])
        >>> sign_flip(a, b)  # gains 2, 1, 0: of the sums 3, 1, -1, -3 two are as far from 0
        0.5
    """
    gains, seeds = _gains_per_image(correct_a, correct_b)
    by_size = np.bincount(np.abs(gains), minlength=seeds + 1)
    distribution = np.ones(1)  # of the sums -top, -top + 2, ..., top
    for size, images in enumerate(by_size.tolist()):
        if size and images:
            flips = np.zeros(size * images + 1)
            flips[::size] = _binomial_half(images)
            distribution = np.convolve(distribution, flips)
    top = len(distribution) - 1
    sums = np.arange(-top, top + 1, 2)
    return float(min(1.0, distribution[np.abs(sums) >= abs(int(gains.sum()))].sum()))


class GapClosed(NamedTuple):
    """The teacher's lead over the baseline, and the share of it that the student gains, with 95 % intervals."""

    gap: Interval  # accuracy(teacher) - accuracy(baseline)
    closed: Interval | None  # share of the gap; None if the gap is not significant


def gap_closed(teacher: Array, baseline: Array, distilled: Array, folds: Array | None = None) -> GapClosed:
    """Return the gap and the share of it that is closed, with intervals over images and, if several, seeds.

    The share is a ratio of means; its interval is Fieller's, the ratios r for which ``gain - r * gap`` may be 0 (E. C.
    Fieller, Some problems in interval estimation, J. R. Stat. Soc. B 16, 1954).

    Args:
        teacher: [N] bool, whether each image was classified correctly.
        baseline: [S, N] bool, a row for each seed.
        distilled: [S, N] bool, for the same seeds and images.
        folds: [N] fold of each image, as for ``crossed_interval``; None: no folds.

    Raises:
        UsageError: no images, or different numbers of them.
    """
    _count_images(teacher, *baseline, *distilled)
    repeated = np.broadcast_to(np.asarray(teacher, dtype=bool), np.shape(baseline))
    count = len(baseline) if folds is None else int(folds.max()) + 1
    if count == 1:
        gap = paired_interval(baseline[0], teacher)
        significant = gap.low > 0 and mcnemar(baseline[0], teacher)["p"] < 0.05
    else:
        crossed = crossed_interval(baseline, repeated, folds=folds)
        gap, significant = Interval(*crossed[:3]), crossed.low > 0 and crossed.p < 0.05
    if not significant:
        return GapClosed(gap, None)
    gain, lead = _differences(baseline, distilled), _differences(baseline, repeated)
    ratio = float(gain.mean() / lead.mean())
    residual = gain - ratio * lead
    variance = _variance_components(residual, residual, folds)
    critical = _critical_value(variance, count, 0.05)
    pairs = ((gain, gain), (gain, lead), (lead, lead))
    if folds is None:
        found = [_variance_components(x, y).total for x, y in pairs]
    else:  # the part of the cells is bounded by 0, and so no covariance: as large beside that of the images for all
        found = [_image_covariance(x, y, folds) * variance.total / variance.images for x, y in pairs]
    of_gain, of_both, of_lead = (critical**2 * each for each in found)
    square = lead.mean() ** 2 - of_lead
    middle = gain.mean() * lead.mean() - of_both
    root = middle**2 - square * (gain.mean() ** 2 - of_gain)
    if square <= 0 or root < 0:
        return GapClosed(gap, None)
    return GapClosed(gap, Interval(ratio, float((middle - root**0.5) / square), float((middle + root**0.5) / square)))


def seeds_summary(a: Sequence[float], b: Sequence[float], *, folds: bool = False) -> dict[str, float | int | None]:
    """Compare a metric of two settings over the same seeds, or the same folds, pairwise.

    Args:
        a: [n] the metric of the reference setting.
        b: [n] the metric of the other setting; entry i has the seed of ``a[i]``.
        folds: the values are those of the n folds of a cross-validation, whose training sets overlap: the interval has
            the correction of ``crossed_interval``, here for the whole variance.

    Returns:
        ``n``; ``mean_a``, ``sd_a``, ``mean_b``, ``sd_b``; ``difference`` (mean of b - a), ``difference_sd``, and
        ``difference_low``, ``difference_high``, its 95 % interval by Student's t.  Standard deviations divide by n - 1;
        with one seed they and the interval are None.

    Raises:
        UsageError: no seeds, or different numbers of them.
    """
    if len(a) != len(b) or not len(a):
        raise UsageError(f"needs the same seeds for both settings, got {len(a)} and {len(b)} values")
    n = len(a)
    difference = np.subtract(b, a)
    mean, deviation = float(difference.mean()), _sample_deviation(difference)
    low = high = None
    if deviation is not None:
        from scipy import special  # here, since the import takes 0.1 s

        half = float(special.stdtrit(n - 1, 0.975)) * deviation * math.sqrt(_overlap_factor(n) if folds else 1) / n**0.5
        low, high = mean - half, mean + half
    return {
        "n": n,
        "mean_a": float(np.mean(a)),
        "sd_a": _sample_deviation(np.asarray(a)),
        "mean_b": float(np.mean(b)),
        "sd_b": _sample_deviation(np.asarray(b)),
        "difference": mean,
        "difference_sd": deviation,
        "difference_low": low,
        "difference_high": high,
    }


def _count_images(*columns: Array) -> int:
    counts = {len(column) for column in columns}
    if len(counts) != 1 or counts == {0}:
        raise UsageError(f"needs the same images for both models, got {[len(column) for column in columns]}")
    return counts.pop()


def _discordant_counts(correct_a: Array, correct_b: Array) -> tuple[int, int]:
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    return int((b & ~a).sum()), int((a & ~b).sum())


def _gains_per_image(correct_a: Array, correct_b: Array) -> tuple[Array, int]:
    """Return, for [S, N] bool of two models, how many more seeds of b are correct on each image [N]; and S."""
    a, b = (np.atleast_2d(np.asarray(each, dtype=bool)) for each in (correct_a, correct_b))
    if a.shape != b.shape or not a.size:
        raise UsageError(f"needs the same seeds and images for both models, got {list(a.shape)} and {list(b.shape)}")
    return b.sum(axis=0, dtype=np.int64) - a.sum(axis=0, dtype=np.int64), len(a)


def _binomial_half(count: int) -> Array:
    """Return the binomial distribution [count + 1] for p = 1/2, by logarithms, since 2 ** count overflows."""
    heads = np.arange(count + 1)
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    distribution: Array = np.exp(logs[count] - logs[heads] - logs[count - heads] - count * math.log(2))
    return distribution


def _differences(correct_a: Array, correct_b: Array) -> Array:
    """Return the gain (-1, 0 or 1) of each seed on each image, [S, N]."""
    a, b = (np.atleast_2d(np.asarray(each)).astype(np.float64) for each in (correct_a, correct_b))
    return b - a


class _VarianceComponents(NamedTuple):
    """The variance of a mean over seeds and images, or the covariance of two means, by source."""

    seeds: float
    images: float

    @property
    def total(self) -> float:
        return self.seeds + self.images

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, self.seeds / self.total)) if self.total > 0 else 0.0


def _overlap_factor(folds: int) -> float:
    """Return by how much more than independent folds those of a cross-validation vary (Nadeau and Bengio)."""
    return 1 + folds / (folds - 1)


def _fold_means(values: Array, folds: Array) -> Array:
    """Return the mean of each fold, [..., N] -> [..., K]."""
    sizes = np.bincount(folds)
    rows = values.reshape(-1, values.shape[-1])
    means: Array = np.stack([np.bincount(folds, row) for row in rows]) / sizes
    return means.reshape(*values.shape[:-1], len(sizes))


def _image_covariance(x: Array, y: Array, folds: Array) -> float:
    """Return the covariance of the means of x and y [S, N] over images within folds."""
    means = [each.mean(axis=0) for each in (x, y)]
    a, b = (each - _fold_means(each, folds)[folds] for each in means)
    images = x.shape[1]
    covariance: float = float(a @ b) / max(1, images - int(folds.max()) - 1) / images
    return covariance


def _fold_components(x: Array, folds: Array) -> _VarianceComponents:
    """Return the variance of the mean of x [S, N] over cells of fold and seed, and over images within folds."""
    seeds, images = x.shape
    sizes, mean = np.bincount(folds), x.mean(axis=0)
    of_images = _image_covariance(x, x, folds)
    cells, of_fold = _fold_means(x, folds), _fold_means(mean, folds)
    between = float(sizes @ (of_fold - x.mean()) ** 2) / (len(sizes) - 1) / images
    of_seeds = 0.0
    if seeds > 1:
        residual = x - mean - (cells - of_fold)[:, folds]
        rest = float(np.vdot(residual, residual)) / max(1, (seeds - 1) * (images - len(sizes)))
        among = float(np.vdot((cells - of_fold) ** 2, np.broadcast_to(sizes, cells.shape))) / ((seeds - 1) * len(sizes))
        of_seeds = max(0.0, (among - rest) / (seeds * images))
    excess = max(0.0, _FOLD_CAUTION * between - of_images - of_seeds)
    return _VarianceComponents(of_seeds + excess * _overlap_factor(len(sizes)), _floor_variance(of_images, x, x))


def _variance_components(x: Array, y: Array, folds: Array | None = None) -> _VarianceComponents:
    """Return the covariance of the means of x and y [S, N] over seeds and images; with one seed, over images."""
    if folds is not None:
        return _fold_components(x, folds)  # only of x with itself
    seeds, images = x.shape
    by_image = [each.mean(axis=0) - each.mean() for each in (x, y)]
    between_images = float(by_image[0] @ by_image[1]) / max(1, images - 1)
    if seeds == 1:
        return _VarianceComponents(0.0, _floor_variance(between_images / images, x, y))
    by_seed = [each.mean(axis=1) - each.mean() for each in (x, y)]
    between_seeds = float(by_seed[0] @ by_seed[1]) / (seeds - 1)
    residuals = [
        each - each.mean() - rows[:, None] - columns
        for each, rows, columns in zip((x, y), by_seed, by_image, strict=True)
    ]
    residual = float(np.vdot(*residuals)) / max(1, (seeds - 1) * (images - 1))
    image_part = between_images / images - residual / (seeds * images)
    return _VarianceComponents(between_seeds / seeds, _floor_variance(image_part, x, y))


def _floor_variance(variance: float, x: Array, y: Array) -> float:
    """Bound a variance over images by 0; if nothing varies at all, use that of two changed images."""
    if x is not y:
        return variance
    return max(variance, 0.0) if (x != x[0, 0]).any() else 2 / x.shape[1] ** 2


def _critical_value(variance: _VarianceComponents, seeds: int, alpha: float) -> float:
    """Return the critical value at level ``alpha`` (two-sided), in standard errors."""
    from scipy import special

    normal = -float(special.ndtri(alpha / 2))
    if seeds == 1:
        return normal
    student = -float(special.stdtrit(seeds - 1, alpha / 2))
    return float(normal + variance.share ** _EXPONENTS.get(seeds, 1.8) * (student - normal))


def _sample_deviation(values: Array) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
