"""Final figures of a split, from what was predicted for every image."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.errors import NonFiniteError, UsageError
from potstill.evaluation.averages import Array, auc_figures, classification_figures, precision_recall_f1
from potstill.evaluation.metrics import CALIBRATION_BINS, FIGURES, NLL_CEILING
from potstill.evaluation.predictions import Predictions
from potstill.evaluation.significance import wilson_interval


def final_metrics(probabilities: Array, labels: Array, class_names: Sequence[str]) -> dict[str, Any]:
    """``split_metrics`` of probabilities [N, K], rows that sum to 1, and labels [N], int64 in [0, K).

    Raises:
        UsageError: shapes that do not fit each other, a label outside [0, K).
        NonFiniteError: a probability is NaN or infinite.
    """
    _check(probabilities, labels, class_names)
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
    areas = found.areas
    if count:
        figures: dict[str, Any] = {
            "top1": float(hits.sum() / count),
            "top3": float((found.before < min(3, classes)).mean()),
            **classification_figures(hits, called, support),
            **auc_figures(areas, found.area, support),
            "ece": _calibration_error(found.confidence, found.correct),
            "nll": _negative_log_likelihood(found.of_label),
        }
    else:
        figures = dict.fromkeys(FIGURES)
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
        **(class_facts(hits, called, support, class_names) if count else {}),
        "auc_skipped": [entry["class"] for entry in per_class if entry["auc"] is None],
    }


def class_facts(hits: Array, predicted: Array, support: Array, class_names: Sequence[str]) -> dict[str, Any]:
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


def _negative_log_likelihood(of_label: Array) -> float:
    losses = -np.log(np.maximum(of_label.astype(np.float64), np.exp(-NLL_CEILING)))
    return float(losses.mean()) + 0.0  # no negative zero


def _check(probabilities: Array, labels: Array, class_names: Sequence[str]) -> None:
    if probabilities.ndim != 2 or probabilities.shape != (len(labels), len(class_names)) or len(class_names) < 2:
        wanted = f"[{len(labels)}, {len(class_names)}]"
        raise UsageError(f"probabilities must be {wanted} with two classes or more, got {list(probabilities.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UsageError(f"labels must be 0 to {len(class_names) - 1}, got {labels.min()} to {labels.max()}")
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise NonFiniteError(f"a probability of image {int(np.argmin(finite))} is NaN or infinite")
