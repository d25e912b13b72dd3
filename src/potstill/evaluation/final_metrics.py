"""Final metrics of a split and their 95 % intervals, from what was predicted for every image."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.errors import NonFiniteError, UsageError
from potstill.evaluation.classification import Array, auc_averages, classification_averages, precision_recall_f1
from potstill.evaluation.metrics import CALIBRATION_BINS, METRIC_NAMES, NLL_CEILING
from potstill.evaluation.predictions import ArrayProbabilities, Predictions
from potstill.evaluation.significance import Z_975, wilson_interval


def final_metrics(probabilities: Array, labels: Array, class_names: Sequence[str]) -> dict[str, Any]:
    """``split_metrics`` of probabilities [N, K], rows that sum to 1, and labels [N], int64 in [0, K).

    Raises:
        UsageError: shapes that do not fit each other, a label outside [0, K).
        NonFiniteError: a probability is NaN or infinite.
    """
    _check_inputs(probabilities, labels, class_names)
    return split_metrics(Predictions.of(probabilities, labels), class_names)


def split_metrics(found: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """The keys of ``StreamingMetrics`` and, for reports, the figures of each class.

    Args:
        found: what was predicted for each image.
        class_names: K names, by number.

    Returns:
        The flat figures, and
        ``per_class``: for each a dict of ``class``, ``precision``, ``recall``, ``f1``, ``auc`` (or None), ``support``;
        ``auc_skipped``: names of classes without AUC, since no image here is of them, or every image is.
    """
    count, classes, labels = len(found.labels), found.classes, found.labels
    hits = np.bincount(labels[found.correct], minlength=classes)
    called, support = (np.bincount(each, minlength=classes) for each in (found.predicted, labels))
    areas = found.auc_per_class
    if count:
        figures: dict[str, Any] = {
            "top1": float(hits.sum() / count),
            "top3": float((found.label_rank < min(3, classes)).mean()),
            **classification_averages(hits, called, support),
            **auc_averages(areas, found.auc_micro, support),
            "ece": _calibration_error(found.confidence, found.correct),
            "nll": _negative_log_likelihood(found.label_probability),
        }
    else:
        figures = dict.fromkeys(METRIC_NAMES)
    columns = zip(class_names, *precision_recall_f1(hits, called, support), areas, support, strict=True)
    per_class = [
        {
            "class": name,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "auc": None if np.isnan(area) else float(area),
            "support": int(images),
        }
        for name, precision, recall, f1, area, images in columns
    ]
    return {
        **figures,
        "count": count,
        "per_class": per_class,
        **(class_diagnostics(hits, called, support, class_names) if count else {}),
        "auc_skipped": [entry["class"] for entry in per_class if entry["auc"] is None],
    }


def class_diagnostics(hits: Array, predicted: Array, support: Array, class_names: Sequence[str]) -> dict[str, Any]:
    """What figures of means may hide.

    Args:
        hits: [K] images of the class that were called so.
        predicted: [K] images that were called so.
        support: [K] images of the class.
        class_names: K names.

    Returns:
        ``absent_classes``: those without images here, which macro figures leave out; ``never_predicted``: those with
        images that the model never predicts; ``largest_class``: share of images of the most frequent class;
        ``at_chance``: whether neither top-1 is clearly above that share nor macro recall clearly above 1 / K.
    """
    present = support > 0
    count, classes = int(support.sum()), int(present.sum())
    largest = float(support.max() / count)
    recall = float((hits[present] / support[present]).mean())
    chance = 1 / classes
    error = math.sqrt(chance * (1 - chance) * float((1 / support[present]).sum())) / classes
    unclear = wilson_interval(int(hits.sum()), count).low <= largest and recall <= chance + 2 * error
    return {
        "absent_classes": [name for name, there in zip(class_names, present, strict=True) if not there],
        "never_predicted": [
            name for name, calls, there in zip(class_names, predicted, present, strict=True) if there and not calls
        ],
        "largest_class": largest,
        "at_chance": bool(classes > 1 and unclear),
    }


def _calibration_error(confidence: Array, right: Array) -> float:
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right.astype(np.float64), minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _negative_log_likelihood(label_probability: Array) -> float:
    losses = -np.log(np.maximum(label_probability.astype(np.float64), np.exp(-NLL_CEILING)))
    return float(losses.mean()) + 0.0  # no negative zero


def _check_inputs(probabilities: Array, labels: Array, class_names: Sequence[str]) -> None:
    if probabilities.ndim != 2 or probabilities.shape != (len(labels), len(class_names)) or len(class_names) < 2:
        wanted = f"[{len(labels)}, {len(class_names)}]"
        raise UsageError(f"probabilities must be {wanted} with two classes or more, got {list(probabilities.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UsageError(f"labels must be 0 to {len(class_names) - 1}, got {labels.min()} to {labels.max()}")
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise NonFiniteError(f"a probability of image {int(np.argmin(finite))} is NaN or infinite")


MAX_DELONG_SCORES = 20_000_000  # N * K up to which scores are sorted for AUC: some seconds
COCHRAN_FACTOR = 25.0  # times the squared skewness: images that make a mean normal (Cochran, Sampling techniques, 1977)
MIN_VARIANCE = 1e-15
MIN_IMAGES_FOR_AUC, MIN_IMAGES_FOR_MACRO = 30, 20  # images of each class: of fewer, less than 92 % hold the truth

Bounds = dict[str, tuple[float, float]]


def metric_intervals(probabilities: Array, labels: Array) -> Bounds:
    """95 % intervals of the figures of ``final_metrics``, by name: (low, high).

    Top-1 and top-3 are shares of images: Wilson's interval.  Precision, recall, F1 and AUC are treated as shares of as
    many images as would give their variance (an effective number of images, as in surveys), which stays right where a
    class is small or perfect; their variance is that of the delta method, for AUC DeLong's.  Macro figures have at most
    the geometric mean of that number and of the harmonic number of their classes' images.  Left out: AUC where it is
    undefined or of more than ``MAX_DELONG_SCORES`` scores; AUC and macro figures where a class has fewer than
    ``MIN_IMAGES_FOR_AUC`` and ``MIN_IMAGES_FOR_MACRO`` images; NLL where it is too skewed for so few images; ECE,
    which the choice of images biases upwards.

    Args:
        probabilities: [N, K], rows that sum to 1.
        labels: [N], int64 in [0, K).

    Raises:
        UsageError: shapes that do not fit each other.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise UsageError(f"needs [N, K] and [N], got {list(probabilities.shape)} and {list(labels.shape)}")
    return split_intervals(Predictions.of(probabilities, labels))


def split_intervals(predictions: Predictions) -> Bounds:
    """``metric_intervals`` of what was predicted for each image."""
    labels, classes, count = predictions.labels, predictions.classes, len(predictions.labels)
    if not count:
        return {}
    found: Bounds = {}
    for name, k in (("top1", 1), ("top3", min(3, classes))):
        _, low, high = wilson_interval(int((predictions.label_rank < k).sum()), count)
        found[name] = (low, high)
    found |= _confusion_intervals(predictions)
    found |= _nll_interval(predictions.label_probability)
    if isinstance(predictions.probabilities, ArrayProbabilities) and count * classes <= MAX_DELONG_SCORES:
        found |= _auc_intervals(predictions.probabilities.array, labels)
    return found


def _effective_images(value: float, variance: float, harmonic: float) -> float:
    """Effective number of images of a macro figure; ``harmonic``: what equal errors in all classes would give."""
    images = value * (1 - value) / variance if variance > MIN_VARIANCE else harmonic
    return math.sqrt(images * harmonic) if images > harmonic else images


def _small_class_factor(by_class: Array, support: Array) -> float:
    """By how much fewer images count, since the variance of small classes is itself uncertain: to first order
    ``(z / t)^2`` with Satterthwaite's degrees of freedom, and one less in the denominator.

    Args:
        by_class: [K] the part of the variance that comes from the images of each class.
        support: [K] images of each class.
    """
    uncertain = float((by_class**2 / np.maximum(support - 1, 0.5)).sum())
    if uncertain <= MIN_VARIANCE**2:
        return 1.0
    degrees = float(by_class.sum()) ** 2 / uncertain
    return 1 / ((1 + 1 / degrees) * (1 + (1 + Z_975**2) / (2 * degrees)))


def _proportion_interval(value: float, images: float) -> tuple[float, float]:
    """Wilson's interval of a share of an effective number of images."""
    middle = (value + Z_975**2 / (2 * images)) / (1 + Z_975**2 / images)
    half = Z_975 * math.sqrt(value * (1 - value) / images + Z_975**2 / (4 * images**2)) / (1 + Z_975**2 / images)
    return max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))


def _confusion_intervals(predictions: Predictions) -> Bounds:
    """Precision, recall and F1: by how much one image of each cell of the confusion matrix moves them."""
    count, classes = len(predictions.labels), predictions.classes
    rows, columns, held = predictions.confusion()
    right = (rows == columns).astype(np.float64)
    support, called = (np.bincount(at, weights=held, minlength=classes) for at in (rows, columns))
    hits = np.bincount(rows, weights=held * right, minlength=classes)
    precision, recall, f1 = precision_recall_f1(hits, called, support)
    present = support > 0
    equal = present / present.sum()
    harmonic = float(present.sum() ** 2 / (1 / support[present]).sum())
    found: Bounds = {}
    for kind, weights in (("macro", equal), ("weighted", support / count)):
        both = weights / np.maximum(called + support, 1)
        if kind == "macro" and support[present].min() < MIN_IMAGES_FOR_MACRO:
            continue
        moved = {
            "precision": (precision, (right - precision[columns]) * (weights / np.maximum(called, 1))[columns]),
            "recall": (recall, (right - recall[rows]) * (weights / np.maximum(support, 1))[rows]),
            "f1": (f1, 2 * right * both[rows] - (f1 * both)[rows] - (f1 * both)[columns]),
        }
        for name, (values, influence) in moved.items():
            value = float(weights @ values)
            if kind == "weighted":  # one more image of a class gives this class more weight
                influence = influence + (values[rows] - value) / count
            by_class = np.bincount(rows, weights=held * influence**2, minlength=classes)
            variance = float(by_class.sum())
            if kind == "macro":
                images = _effective_images(value, variance, harmonic)
            else:
                images = value * (1 - value) / variance if variance > MIN_VARIANCE else count
            found[f"{name}_{kind}"] = _proportion_interval(
                value, min(images, count) * _small_class_factor(by_class, support)
            )
    _, low, high = wilson_interval(int(hits.sum()), count)
    return found | {f"{name}_micro": (low, high) for name in ("precision", "recall", "f1")}


def _nll_interval(label_probability: Array) -> Bounds:
    """Student's interval of the mean, where the images are enough for its skewness."""
    losses = -np.log(np.maximum(label_probability.astype(np.float64), np.exp(-NLL_CEILING)))
    count, deviation = len(losses), float(losses.std())
    if count < 2 or deviation == 0:
        return {}
    skewness = float((((losses - losses.mean()) / deviation) ** 3).mean())
    if count < COCHRAN_FACTOR * skewness**2:
        return {}
    half = Z_975 * deviation / math.sqrt(count - 1)
    ends = (float(losses.mean()) - half, float(losses.mean()) + half)
    return {"nll": ends, "loss": ends}


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
            areas[k], influences[:, k] = _auc_influence(probabilities[:, k], positive[:, k])
    micro, pooled = _auc_influence(probabilities.ravel(), positive.ravel())
    defined = ~np.isnan(areas)
    parts = {"auc_micro": pooled.reshape(count, classes).sum(axis=1)}
    if defined.any():
        parts["auc_macro"] = influences[:, defined].mean(axis=1)
        parts["auc_weighted"] = influences[:, defined] @ (support[defined] / support[defined].sum())
    values = auc_averages(areas, micro, support)
    # Of a perfect order the variance is 0: each area is then a share of the images of the class, or of all others.
    smaller = np.minimum(support, count - support)[defined]
    harmonic = len(smaller) ** 2 / float((1 / smaller).sum()) if len(smaller) else float(count)
    fewest = int(smaller.min(initial=count))
    found: Bounds = {}
    for name, part in parts.items():
        value, variance = values[name] or 0.0, float((part**2).sum())
        images = value * (1 - value) / variance if variance > MIN_VARIANCE else harmonic
        if name != "auc_micro":
            if fewest < MIN_IMAGES_FOR_AUC:
                continue
            images *= _small_class_factor(np.bincount(labels, weights=part**2, minlength=classes), support)
        found[name] = _proportion_interval(value, images)
    return found


def _auc_influence(scores: Array, positive: Array) -> tuple[float, Array]:
    """The area under the ROC curve, and by how much each score moves it: [N]; their squares sum to its variance."""
    own, others = np.sort(scores[positive]), np.sort(scores[~positive])
    moved = np.empty(len(scores))
    moved[positive] = _share_below(others, scores[positive])
    moved[~positive] = 1 - _share_below(own, scores[~positive])
    area = float(moved[positive].mean())
    moved -= area
    moved[positive] /= len(own)
    moved[~positive] /= len(others)
    return area, moved


def _share_below(ranked: Array, values: Array) -> Array:
    """Share of ``ranked`` (ascending) below each value; equal ones count one half."""
    order = np.argsort(values)  # ordered queries find their place much faster
    queries = values[order]
    found = np.empty(len(values))
    found[order] = np.searchsorted(ranked, queries, "left") + np.searchsorted(ranked, queries, "right")
    return found / (2 * len(ranked))
