"""Area under the ROC curve: the chance that an image of the class scores above one of another class.

Equal scores count one half, which is what the trapezoids of scikit-learn's ``roc_auc_score`` come to.
"""

import math

import numpy as np

from potstill.evaluation.averages import Array


def exact_auc(scores: Array, positive: Array) -> float:
    """The area from all scores; NaN where there are no positives or no negatives.

    Args:
        scores: [N] real numbers, infinities allowed; only their order counts.
        positive: [N] bool.
    """
    return _area(np.sort(scores), scores[positive])


def exact_auc_per_class(scores: Array, labels: Array) -> tuple[Array, float]:
    """One class against the rest, for scores [N, K] and labels [N]: areas [K], and that of all classes pooled."""
    ranked = np.sort(scores.T, axis=1)  # [K, N]
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]  # of each image's class
    by_class = own[np.argsort(labels, kind="stable")]
    ends = np.cumsum(np.bincount(labels, minlength=len(ranked)))[:-1]
    per_class = [_area(row, chosen) for row, chosen in zip(ranked, np.split(by_class, ends), strict=True)]
    return np.array(per_class), _area(np.sort(ranked, axis=None), own)


def _area(ranked: Array, positives: Array) -> float:
    """From all scores in ascending order and, in any order, those of the positives."""
    chosen, all_others = len(positives), len(ranked) - len(positives)
    if not chosen or not all_others:
        return math.nan
    positives = np.sort(positives)  # ordered queries find their place much faster
    below, upto = np.searchsorted(ranked, positives, "left"), np.searchsorted(ranked, positives, "right")
    # Mann and Whitney: below + upto counts each lower score twice, each equal one (itself too) once.
    wins_twice = int((below + upto).sum()) - chosen * chosen
    return wins_twice / (2 * chosen * all_others)


def binned_auc(positive: Array, negative: Array) -> Array:
    """The area from histograms over ascending bins, [..., bins] -> [...]; scores in one bin count as equal."""
    positive, negative = positive.astype(np.float64), negative.astype(np.float64)
    below = np.cumsum(negative, axis=-1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=-1)
    pairs = positive.sum(axis=-1) * negative.sum(axis=-1)
    area: Array = np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)
    return area


def binned_auc_per_class(histogram: Array) -> tuple[Array, float]:
    """As ``exact_auc_per_class``, from histograms [2, K, bins] of negatives and positives."""
    pooled = histogram.sum(axis=1, dtype=np.int64)
    return binned_auc(histogram[1], histogram[0]), float(binned_auc(pooled[1], pooled[0]))
