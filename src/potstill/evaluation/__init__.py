"""Evaluation: precision, recall, F1 and AUC of each class, and their micro, macro and weighted averages.

AUC is the probability that an image of the class scores above one of another class; ties count one half, as in
scikit-learn's ``roc_auc_score``.  No torch here.
"""

import math
from typing import Any

import numpy as np

MetricValues = dict[str, float | None]
Array = np.ndarray[Any, Any]


def precision_recall_f1(hits: Array, predicted: Array, support: Array) -> tuple[Array, Array, Array]:
    """Return precision, recall and F1 [K] from counts of true positives, predictions and images; 0 / 0 is 0."""
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support)


def classification_averages(hits: Array, predicted: Array, support: Array) -> MetricValues:
    """Return ``precision_``, ``recall_`` and ``f1_`` + ``micro``, ``macro`` and ``weighted``.

    Macro is the mean over the classes with images, as in scikit-learn with ``labels=np.unique(y_true),
    zero_division=0``; weighted averages by support; micro pools all K classes.
    """
    names = ("precision", "recall", "f1")
    per_class = precision_recall_f1(hits, predicted, support)
    pooled = precision_recall_f1(hits.sum(keepdims=True), predicted.sum(keepdims=True), support.sum(keepdims=True))
    averages: MetricValues = {}
    for name, values, micro in zip(names, per_class, pooled, strict=True):
        averages[f"{name}_micro"] = float(micro[0])
        averages[f"{name}_macro"] = float(values[support > 0].mean())
        averages[f"{name}_weighted"] = float(np.average(values, weights=support))
    return averages


def auc_averages(per_class: Array, micro: float, support: Array) -> MetricValues:
    """Return ``auc_`` + ``micro``, ``macro`` and ``weighted``, one class against the rest; NaN is skipped."""
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


def exact_auc_per_class(scores: Array, labels: Array) -> tuple[Array, float]:
    """Return the AUC of each class against the rest [K], and of all pooled; NaN without positives or negatives.

    Only the order of scores [N, K] counts; infinities are allowed.
    """
    ranked = np.sort(scores.T, axis=1)  # [K, N]
    label_scores = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    by_class = label_scores[np.argsort(labels, kind="stable")]
    ends = np.cumsum(np.bincount(labels, minlength=len(ranked)))[:-1]
    per_class = [
        _auc_from_ranks(row, positives) for row, positives in zip(ranked, np.split(by_class, ends), strict=True)
    ]
    return np.array(per_class), _auc_from_ranks(np.sort(ranked, axis=None), label_scores)


def _auc_from_ranks(ranked: Array, positives: Array) -> float:
    """Return the AUC from all scores in ascending order, and the scores of the positives in any order."""
    positive_count, negative_count = len(positives), len(ranked) - len(positives)
    if not positive_count or not negative_count:
        return math.nan
    positives = np.sort(positives)  # searchsorted is much faster on sorted queries
    below, upto = np.searchsorted(ranked, positives, "left"), np.searchsorted(ranked, positives, "right")
    # Mann and Whitney: below + upto counts each lower score twice, each equal one (itself too) once.
    wins_twice = int((below + upto).sum()) - positive_count**2
    return wins_twice / (2 * positive_count * negative_count)


def binned_auc_per_class(histogram: Array) -> tuple[Array, float]:
    """Compute ``exact_auc_per_class`` from histograms [2, K, bins] of negatives and positives over ascending scores."""
    pooled = histogram.sum(axis=1, dtype=np.int64)
    return _binned_auc(*histogram), float(_binned_auc(*pooled))


def _binned_auc(negative: Array, positive: Array) -> Array:
    """Reduce histograms [..., bins] to AUC [...]; scores in one bin count as ties."""
    positive, negative = positive.astype(np.float64), negative.astype(np.float64)
    below = np.cumsum(negative, axis=-1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=-1)
    pairs = positive.sum(axis=-1) * negative.sum(axis=-1)
    auc: Array = np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)
    return auc
