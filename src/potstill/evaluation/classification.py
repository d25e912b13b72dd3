"""Precision, recall, F1 and area under the ROC curve of each class, and their micro, macro and weighted averages.

The area is the chance that an image of the class scores above one of another class.  Equal scores count one half, which
is what the trapezoids of scikit-learn's ``roc_auc_score`` come to.  Needs no torch.
"""

import math
from typing import Any

import numpy as np

MetricValues = dict[str, float | None]
Array = np.ndarray[Any, Any]


def precision_recall_f1(hits: Array, predicted: Array, support: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of each class; a quotient of zero by zero counts as 0, as in scikit-learn.

    Args:
        hits: [K] images of the class that were called so.
        predicted: [K] images that were called so.
        support: [K] images of the class.
    """
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support)


def classification_averages(hits: Array, predicted: Array, support: Array) -> MetricValues:
    """``precision_``, ``recall_`` and ``f1_`` + ``micro``, ``macro`` and ``weighted``.

    Macro is the mean over the classes that have images here: equal to scikit-learn with ``labels=np.unique(y_true),
    zero_division=0``.  Weighted goes by the number of images; micro pools all K classes.
    """
    names = ("precision", "recall", "f1")
    per_class = precision_recall_f1(hits, predicted, support)
    pooled = precision_recall_f1(hits.sum(keepdims=True), predicted.sum(keepdims=True), support.sum(keepdims=True))
    figures: MetricValues = {}
    for name, values, micro in zip(names, per_class, pooled, strict=True):
        figures[f"{name}_micro"] = float(micro[0])
        figures[f"{name}_macro"] = float(values[support > 0].mean())
        figures[f"{name}_weighted"] = float(np.average(values, weights=support))
    return figures


def auc_averages(per_class: Array, micro: float, support: Array) -> MetricValues:
    """``auc_`` + ``micro``, ``macro`` and ``weighted``, one class against the rest.

    Args:
        per_class: [K] areas; NaN where a class has no image, or no image is of another class: those are skipped.
        micro: area over the scores of all classes pooled.
        support: [K] images of the class, the weights.
    """
    defined = ~np.isnan(per_class)
    if not defined.any():
        macro = weighted = None
    else:
        macro = float(per_class[defined].mean())
        weighted = float(np.average(per_class[defined], weights=support[defined]))
    return {"auc_micro": None if np.isnan(micro) else float(micro), "auc_macro": macro, "auc_weighted": weighted}


def _ratio(part: Array, whole: Array) -> Array:
    ratio: Array = np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return ratio


def exact_auc(scores: Array, positive: Array) -> float:
    """The area from all scores; NaN where there are no positives or no negatives.

    Args:
        scores: [N] real numbers, infinities allowed; only their order counts.
        positive: [N] bool.
    """
    return _auc_from_ranks(np.sort(scores), scores[positive])


def exact_auc_per_class(scores: Array, labels: Array) -> tuple[Array, float]:
    """One class against the rest, for scores [N, K] and labels [N]: areas [K], and that of all classes pooled."""
    ranked = np.sort(scores.T, axis=1)  # [K, N]
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]  # of each image's class
    by_class = own[np.argsort(labels, kind="stable")]
    ends = np.cumsum(np.bincount(labels, minlength=len(ranked)))[:-1]
    per_class = [_auc_from_ranks(row, chosen) for row, chosen in zip(ranked, np.split(by_class, ends), strict=True)]
    return np.array(per_class), _auc_from_ranks(np.sort(ranked, axis=None), own)


def _auc_from_ranks(ranked: Array, positives: Array) -> float:
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
