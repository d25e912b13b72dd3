"""How sure each figure of one model on one split is: from its images alone."""

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array, auc_figures, classification_figures
from potstill.evaluation.metrics import CALIBRATION_BINS, NLL_CEILING
from potstill.evaluation.predictions import Held, Predictions
from potstill.evaluation.significance import Z_975, wilson_interval

RESAMPLES = 1000
CALIBRATION_RESAMPLES = 400  # of N numbers each
MOST_SCORES = 20_000_000  # N * K up to which scores are sorted for AUC: some seconds

Bounds = dict[str, tuple[float, float]]


def metric_intervals(probabilities: Array, labels: Array, seed: int = 0) -> Bounds:
    """95 % intervals of the figures of ``final_metrics``, by name: (low, high).

    Top-1 and top-3 are shares of images: Wilson's interval.  AUC: DeLong's; left out where it is undefined, or where
    there are more than ``MOST_SCORES`` scores.  All others: percentiles of bootstrap resamples of the images; the
    calibration error by the reflected percentiles, since resampling adds to it what it is off by.

    Args:
        probabilities: [N, K], rows that sum to 1.
        labels: [N], int64 in [0, K).
        seed: of the resampling.

    Raises:
        UsageError: shapes that do not fit each other.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise UsageError(f"needs [N, K] and [N], got {list(probabilities.shape)} and {list(labels.shape)}")
    return split_intervals(Predictions.of(probabilities, labels), seed)


def split_intervals(predictions: Predictions, seed: int = 0) -> Bounds:
    """``metric_intervals`` of what was predicted for each image."""
    labels, classes, count = predictions.labels, predictions.classes, len(predictions.labels)
    if not count:
        return {}
    random = np.random.default_rng(seed)
    found: Bounds = {}
    for name, k in (("top1", 1), ("top3", min(3, classes))):
        _, low, high = wilson_interval(int((predictions.before < k).sum()), count)
        found[name] = (low, high)
    found |= _confusion_intervals(predictions, random)
    found |= _calibration_intervals(predictions, random)
    if isinstance(predictions.rows, Held) and count * classes <= MOST_SCORES:
        found |= _auc_intervals(predictions.rows.array, labels)
    return found


def _confusion_intervals(predictions: Predictions, random: np.random.Generator) -> Bounds:
    """Precision, recall and F1 follow from how many images fall into each cell of the confusion matrix."""
    count, classes = len(predictions.labels), predictions.classes
    rows, columns, held = predictions.confusion()
    resampled: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):  # one by one: there may be hundreds of thousands of cells
        drawn = random.multinomial(count, held / count)
        hits = np.bincount(rows, weights=drawn * (rows == columns), minlength=classes)
        called = np.bincount(columns, weights=drawn, minlength=classes)
        support = np.bincount(rows, weights=drawn, minlength=classes)
        for name, value in classification_figures(hits, called, support).items():
            resampled.setdefault(name, []).append(float(value or 0.0))
    return {name: _percentiles(np.array(values)) for name, values in resampled.items()}


def _calibration_intervals(predictions: Predictions, random: np.random.Generator) -> Bounds:
    count, right = len(predictions.labels), predictions.correct
    confidence = predictions.confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    losses = -np.log(np.maximum(predictions.of_label.astype(np.float64), np.exp(-NLL_CEILING)))
    gaps = confidence - right
    errors, means = [], []
    for _ in range(CALIBRATION_RESAMPLES):
        drawn = random.integers(0, count, count)
        sums = np.bincount(bins[drawn], weights=gaps[drawn], minlength=CALIBRATION_BINS)
        errors.append(np.abs(sums).sum() / count)
        means.append(losses[drawn].mean())
    value = float(np.abs(np.bincount(bins, weights=gaps, minlength=CALIBRATION_BINS)).sum() / count)
    low, high = _percentiles(np.array(errors))
    nll = _percentiles(np.array(means))
    reflected = (max(0.0, 2 * value - high), min(1.0, max(value, 2 * value - low)))  # the figure itself stays inside
    return {"ece": reflected, "nll": nll, "loss": nll}


def _auc_intervals(probabilities: Array, labels: Array) -> Bounds:
    """Each area is a mean over pairs of images; what one image does to it gives its variance (DeLong et al. 1988).

    For a mean over classes, or all classes pooled, an image's parts are added up before they are squared, since its
    scores for the classes depend on each other.
    """
    count, classes = probabilities.shape
    positive = labels[:, None] == np.arange(classes)  # [N, K]
    support = positive.sum(axis=0)
    areas, influences = np.full(classes, np.nan), np.zeros((count, classes))
    for k in range(classes):
        if 0 < support[k] < count:
            areas[k], influences[:, k] = _influence(probabilities[:, k], positive[:, k])
    micro, pooled = _influence(probabilities.ravel(), positive.ravel())
    defined = ~np.isnan(areas)
    parts = {"auc_micro": pooled.reshape(count, classes).sum(axis=1)}
    if defined.any():
        parts["auc_macro"] = influences[:, defined].mean(axis=1)
        parts["auc_weighted"] = influences[:, defined] @ (support[defined] / support[defined].sum())
    values = auc_figures(areas, micro, support)
    found: Bounds = {}
    for name, part in parts.items():
        half = Z_975 * float(np.sqrt((part**2).sum()))
        found[name] = (max(0.0, (values[name] or 0.0) - half), min(1.0, (values[name] or 0.0) + half))
    return found


def _influence(scores: Array, positive: Array) -> tuple[float, Array]:
    """The area under the ROC curve, and by how much each score moves it: [N]; their squares sum to its variance."""
    own, others = np.sort(scores[positive]), np.sort(scores[~positive])
    moved = np.empty(len(scores))
    moved[positive] = _below(others, scores[positive])
    moved[~positive] = 1 - _below(own, scores[~positive])
    area = float(moved[positive].mean())
    moved -= area
    moved[positive] /= len(own)
    moved[~positive] /= len(others)
    return area, moved


def _below(ranked: Array, values: Array) -> Array:
    """Share of ``ranked`` (ascending) below each value; equal ones count one half."""
    order = np.argsort(values)  # ordered queries find their place much faster
    queries = values[order]
    found = np.empty(len(values))
    found[order] = np.searchsorted(ranked, queries, "left") + np.searchsorted(ranked, queries, "right")
    return found / (2 * len(ranked))


def _percentiles(resampled: Array) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
