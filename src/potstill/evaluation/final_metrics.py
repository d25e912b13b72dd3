"""Final metrics of a split, their 95 % confidence intervals, and calibration, from the predictions for all images.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation import Array, auc_averages, classification_averages, precision_recall_f1
from potstill.evaluation.metrics import CALIBRATION_BINS, METRIC_NAMES, NLL_CEILING
from potstill.evaluation.predictions import ArrayProbabilities, Predictions, Probabilities, as_probabilities
from potstill.evaluation.significance import Z_975, score_interval, wilson_interval


def final_metrics(probabilities: Array, labels: Array, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute ``split_metrics`` of probabilities [N, K], rows that sum to 1, and labels [N], int64 in [0, K)."""
    if probabilities.ndim != 2 or probabilities.shape != (len(labels), len(class_names)) or len(class_names) < 2:
        expected = f"[{len(labels)}, {len(class_names)}]"
        raise UsageError(f"probabilities must be {expected} with two classes or more, got {list(probabilities.shape)}")
    return split_metrics(Predictions.of(probabilities, labels), class_names)


def split_metrics(predictions: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of ``StreamingMetrics``, those of each class, and diagnostics.

    Returns:
        The flat metrics;
        ``per_class``: for each a dict of ``class``, ``precision``, ``recall``, ``f1``, ``auc`` (or None), ``support``;
        ``auc_skipped``: names of classes without AUC, as none or all of the images are of them;
        ``absent_classes``: those without images, which macro averages leave out;
        ``never_predicted``: those with images that the model never predicts;
        ``largest_class``: share of images of the most frequent class;
        ``at_chance``: whether neither top-1 is clearly above that share nor macro recall clearly above 1 / K.
    """
    count, classes, labels = len(predictions.labels), predictions.classes, predictions.labels
    hits = np.bincount(labels[predictions.correct], minlength=classes)
    predicted, support = (np.bincount(each, minlength=classes) for each in (predictions.predicted, labels))
    aucs = predictions.auc_per_class
    if count:
        metrics: dict[str, Any] = {
            "top1": float(hits.sum() / count),
            "top3": float((predictions.label_rank < min(3, classes)).mean()),
            **classification_averages(hits, predicted, support),
            **auc_averages(aucs, predictions.auc_micro, support),
            "ece": _calibration_error(predictions.confidence, predictions.correct),
            "nll": float(_losses(predictions.label_probability).mean()) + 0.0,  # no negative zero
        }
    else:
        metrics = dict.fromkeys(METRIC_NAMES)
    columns = zip(class_names, *precision_recall_f1(hits, predicted, support), aucs, support, strict=True)
    per_class = [
        {
            "class": name,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "auc": None if np.isnan(auc) else float(auc),
            "support": int(images),
        }
        for name, precision, recall, f1, auc, images in columns
    ]
    return {
        **metrics,
        "count": count,
        "per_class": per_class,
        **(_class_diagnostics(hits, predicted, support, class_names) if count else {}),
        "auc_skipped": [entry["class"] for entry in per_class if entry["auc"] is None],
    }


def _class_diagnostics(hits: Array, predicted: Array, support: Array, class_names: Sequence[str]) -> dict[str, Any]:
    present = support > 0
    count, classes = int(support.sum()), int(present.sum())
    largest = float(support.max() / count)
    recall = float((hits[present] / support[present]).mean())
    chance = 1 / classes
    error = math.sqrt(chance * (1 - chance) * float((1 / support[present]).sum())) / classes
    unclear = wilson_interval(int(hits.sum()), count).low <= largest and recall <= chance + 2 * error
    names = np.asarray(class_names, dtype=object)
    return {
        "absent_classes": names[~present].tolist(),
        "never_predicted": names[present & (predicted == 0)].tolist(),
        "largest_class": largest,
        "at_chance": bool(classes > 1 and unclear),
    }


def _calibration_error(confidence: Array, correct: Array) -> float:
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct.astype(np.float64), minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _losses(label_probability: Array) -> Array:
    return np.asarray(-np.log(np.maximum(label_probability.astype(np.float64), np.exp(-NLL_CEILING))))


MAX_DELONG_SCORES = 20_000_000  # N * K up to which DeLong's variance is computed: some seconds
COCHRAN_FACTOR = 25.0  # n > 25 skewness^2 for a normal mean (Cochran, Sampling techniques, 1977)
MIN_VARIANCE = 1e-15
MIN_IMAGES_FOR_AUC, MIN_IMAGES_FOR_MACRO = 30, 20  # per class; with fewer, coverage falls below 92 %

Bounds = dict[str, tuple[float, float]]


def split_intervals(predictions: Predictions) -> Bounds:
    """Return 95 % intervals (low, high) of the metrics of ``split_metrics`` by name.

    Top-1 and top-3 have Wilson's interval.  Precision, recall, F1 and AUC are treated as proportions of an effective
    number of images that gives their variance (delta method; DeLong for AUC), which holds for small and perfect classes
    too.  For macro averages, that number is at most its geometric mean with the harmonic number of images per class.

    Left out: AUC that is undefined or of more than ``MAX_DELONG_SCORES`` scores; AUC and macro averages if a class has
    fewer than ``MIN_IMAGES_FOR_AUC`` or ``MIN_IMAGES_FOR_MACRO`` images; NLL that is too skewed for so few images; ECE,
    whose estimate is biased upwards.
    """
    labels, classes, count = predictions.labels, predictions.classes, len(predictions.labels)
    if not count:
        return {}
    found: Bounds = {}
    for name, k in (("top1", 1), ("top3", min(3, classes))):
        found[name] = wilson_interval(int((predictions.label_rank < k).sum()), count)[1:]
    found |= _confusion_intervals(predictions)
    found |= _nll_interval(predictions.label_probability)
    if isinstance(predictions.probabilities, ArrayProbabilities) and count * classes <= MAX_DELONG_SCORES:
        found |= _auc_intervals(predictions.probabilities.array, labels)
    return found


def _effective_images(value: float, variance: float, harmonic: float) -> float:
    """Return the effective number of images of a macro average; ``harmonic``: that for equal errors in all classes."""
    images = value * (1 - value) / variance if variance > MIN_VARIANCE else harmonic
    return math.sqrt(images * harmonic) if images > harmonic else images


def _small_class_factor(by_class: Array, support: Array) -> float:
    """Return the factor on the effective number of images for the uncertain variance of small classes.

    To first order ``(z / t)^2`` with Satterthwaite's degrees of freedom, and one less in the denominator.
    """
    uncertain = float((by_class**2 / np.maximum(support - 1, 0.5)).sum())
    if uncertain <= MIN_VARIANCE**2:
        return 1.0
    degrees = float(by_class.sum()) ** 2 / uncertain
    return 1 / ((1 + 1 / degrees) * (1 + (1 + Z_975**2) / (2 * degrees)))


def _confusion_intervals(predictions: Predictions) -> Bounds:
    """Return intervals of precision, recall and F1, from the influence of each cell of the confusion matrix."""
    count, classes = len(predictions.labels), predictions.classes
    rows, columns, images = predictions.confusion()
    correct = (rows == columns).astype(np.float64)
    support, predicted = (np.bincount(at, weights=images, minlength=classes) for at in (rows, columns))
    hits = np.bincount(rows, weights=images * correct, minlength=classes)
    precision, recall, f1 = precision_recall_f1(hits, predicted, support)
    present = support > 0
    equal = present / present.sum()
    harmonic = float(present.sum() ** 2 / (1 / support[present]).sum())
    found: Bounds = {}
    for kind, weights in (("macro", equal), ("weighted", support / count)):
        both = weights / np.maximum(predicted + support, 1)
        if kind == "macro" and support[present].min() < MIN_IMAGES_FOR_MACRO:
            continue
        influences = {
            "precision": (precision, (correct - precision[columns]) * (weights / np.maximum(predicted, 1))[columns]),
            "recall": (recall, (correct - recall[rows]) * (weights / np.maximum(support, 1))[rows]),
            "f1": (f1, 2 * correct * both[rows] - (f1 * both)[rows] - (f1 * both)[columns]),
        }
        for name, (values, influence) in influences.items():
            value = float(weights @ values)
            if kind == "weighted":  # an image also adds to the weight of its class
                influence = influence + (values[rows] - value) / count
            by_class = np.bincount(rows, weights=images * influence**2, minlength=classes)
            variance = float(by_class.sum())
            if kind == "macro":
                effective = _effective_images(value, variance, harmonic)
            else:
                effective = value * (1 - value) / variance if variance > MIN_VARIANCE else count
            effective = min(effective, count) * _small_class_factor(by_class, support)
            found[f"{name}_{kind}"] = score_interval(value, effective)
    micro = wilson_interval(int(hits.sum()), count)[1:]
    return found | {f"{name}_micro": micro for name in ("precision", "recall", "f1")}


def _nll_interval(label_probability: Array) -> Bounds:
    """Return Student's interval of the mean, if there are enough images for its skewness."""
    losses = _losses(label_probability)
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
    """Return intervals of AUC, a mean over pairs of images, by the influence of each image (DeLong et al. 1988).

    For a mean over classes, or all classes pooled, an image's influences are summed before they are squared, since its
    scores for the classes depend on each other.
    """
    count, classes = probabilities.shape
    positive = labels[:, None] == np.arange(classes)  # [N, K]
    support = positive.sum(axis=0)
    aucs, influences = np.full(classes, np.nan), np.zeros((count, classes))
    for k in range(classes):
        if 0 < support[k] < count:
            aucs[k], influences[:, k] = _auc_influence(probabilities[:, k], positive[:, k])
    micro, pooled = _auc_influence(probabilities.ravel(), positive.ravel())
    defined = ~np.isnan(aucs)
    parts = {"auc_micro": pooled.reshape(count, classes).sum(axis=1)}
    if defined.any():
        parts["auc_macro"] = influences[:, defined].mean(axis=1)
        parts["auc_weighted"] = influences[:, defined] @ (support[defined] / support[defined].sum())
    values = auc_averages(aucs, micro, support)
    # The variance of a perfect AUC is 0; it then counts as a proportion of the images of the class or of all others.
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
        found[name] = score_interval(value, images)
    return found


def _auc_influence(scores: Array, positive: Array) -> tuple[float, Array]:
    """Return the AUC and the influence [N] of each score on it; the squared influences sum to its variance."""
    positives, negatives = np.sort(scores[positive]), np.sort(scores[~positive])
    influence = np.empty(len(scores))
    influence[positive] = _fraction_below(negatives, scores[positive])
    influence[~positive] = 1 - _fraction_below(positives, scores[~positive])
    auc = float(influence[positive].mean())
    influence -= auc
    influence[positive] /= len(positives)
    influence[~positive] /= len(negatives)
    return auc, influence


def _fraction_below(ranked: Array, values: Array) -> Array:
    """Return the fraction of ``ranked`` (ascending) below each value; ties count one half."""
    order = np.argsort(values)  # searchsorted is much faster on sorted queries
    queries = values[order]
    counts = np.empty(len(values))
    counts[order] = np.searchsorted(ranked, queries, "left") + np.searchsorted(ranked, queries, "right")
    return counts / (2 * len(ranked))


RELIABILITY_BINS = 15
_TINY = float(np.finfo(np.float32).tiny)
# Losses that leave the scale of the logits open, such as correlations, end at temperatures of a hundredth.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.001, 20.0
_CHI_SQUARED = 10.83  # its quantile 0.999 with one degree of freedom
_MAX_STEPS, _TOLERANCE = 60, 1e-9  # of Newton's method; tolerance relative to 1 / T


def calibration_report(
    val: Probabilities | Array,
    val_labels: Array,
    test: Probabilities | Array,
    test_labels: Array,
    applied: float | None = None,
) -> dict[str, Any] | None:
    """Return calibration metrics on test before and after scaling with the temperature fitted on val.

    Return ``temperature``; ``applied``, whether the network has it in its logits; ``before`` and ``after``, each with
    ``ece`` (0 to 1), ``nll`` (nats) and ``bins``: for each of 15 bins of confidence with images their number, mean
    confidence and accuracy.  None if a split has no images.
    """
    val, test = as_probabilities(val), as_probabilities(test)
    if not val.shape[0] or not test.shape[0]:
        return None
    temperature = applied or fit_temperature(val, val_labels)
    before, after = (1 / applied, 1.0) if applied else (1.0, temperature)
    return {
        "temperature": temperature,
        "applied": applied is not None,
        "before": _calibration_metrics(test, test_labels, before),
        "after": _calibration_metrics(test, test_labels, after),
    }


def temperature_pays(gain: float, images: int, temperature: float) -> bool:
    """Return whether a fitted temperature lowers the NLL beyond doubt.

    By the likelihood-ratio test: without any use, 2 N times the gain of the mean NLL, in nats, follows chi-squared with
    one degree of freedom, so that one useless temperature in a thousand passes.  One at an end of its range was not
    fitted.

    Example:
        >>> temperature_pays(0.01, 500, 1.4), temperature_pays(0.01, 600, 1.4), temperature_pays(2.0, 600, 0.001)
        (False, True, False)
    """
    fitted = 1.01 * _MIN_TEMPERATURE < temperature < 0.99 * _MAX_TEMPERATURE
    return fitted and 2 * images * gain > _CHI_SQUARED


def fit_temperature(probabilities: Probabilities | Array, labels: Array) -> float:
    """Return the temperature in [0.001, 20] of minimal NLL.

    It is 0 for a network without errors on these images, whose confidence would then have no bound: there, 1 / (N + 2)
    of each label is spread over the classes, as if it were wrong that often (Platt, 1999).
    """
    probabilities = as_probabilities(probabilities)
    _check_inputs(probabilities.shape, labels)
    found = _minimize_nll(probabilities, labels, 0.0)
    return found if found > 1.01 * _MIN_TEMPERATURE else _minimize_nll(probabilities, labels, 1 / (len(labels) + 2))


def _minimize_nll(probabilities: Probabilities, labels: Array, smoothing: float) -> float:
    """Return the temperature, by Newton's method: NLL is convex in 1 / T."""
    low, high, inverse = 1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE, 1.0
    for _ in range(_MAX_STEPS):
        slope, curvature = _nll_derivatives(probabilities, labels, inverse, smoothing)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Bisect in logarithms if Newton's step leaves the bracket.
        previous, inverse = inverse, step if low < step < high else math.sqrt(low * high)
        if abs(inverse - previous) <= _TOLERANCE * previous:
            break
    return 1 / inverse


def _nll_derivatives(
    probabilities: Probabilities, labels: Array, inverse: float, smoothing: float
) -> tuple[float, float]:
    """Return the first and second derivative of the NLL with respect to 1 / T."""
    slope = curvature = 0.0
    for rows, block in probabilities.blocks():
        logs = _safe_log(block)
        scaled = np.exp(_log_softmax(logs * inverse))
        mean = (scaled * logs).sum(axis=1)
        wanted = (1 - smoothing) * logs[np.arange(len(logs)), labels[rows]] + smoothing * logs.mean(axis=1)
        slope += float((mean - wanted).sum())
        curvature += float(((scaled * logs**2).sum(axis=1) - mean**2).sum())
    return slope / probabilities.shape[0], curvature / probabilities.shape[0]


def reliability_bins(confidence: Array, correct: Array) -> list[list[float]]:
    """Return number of images, mean confidence and accuracy of each non-empty bin (low, high], by confidence."""
    number = np.clip(np.ceil(confidence * RELIABILITY_BINS) - 1, 0, RELIABILITY_BINS - 1).astype(int)
    return [
        [int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean())]
        for each in range(RELIABILITY_BINS)
        if (inside := number == each).any()
    ]


def _calibration_metrics(probabilities: Probabilities, labels: Array, temperature: float) -> dict[str, Any]:
    count = len(labels)
    confidence, correct, loss = np.zeros(count), np.zeros(count, dtype=bool), 0.0
    for rows, block in probabilities.blocks():
        logs = _safe_log(block) if temperature == 1 else _log_softmax(_safe_log(block) / temperature)
        confidence[rows] = block.max(axis=1) if temperature == 1 else np.exp(logs.max(axis=1))
        correct[rows] = block.argmax(axis=1) == labels[rows]
        loss -= float(logs[np.arange(len(logs)), labels[rows]].sum())
    bins = reliability_bins(confidence, correct)
    ece = sum(images * abs(mean - accuracy) for images, mean, accuracy in bins) / count
    return {"ece": ece, "nll": loss / count, "bins": bins}


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _safe_log(probabilities: Array) -> Array:
    # A probability that float32 rounded to 0 counts as its smallest number.
    return np.asarray(np.log(np.maximum(probabilities.astype(np.float64), _TINY)))


def _check_inputs(shape: tuple[int, ...], labels: Array) -> None:
    if len(shape) != 2 or labels.shape != shape[:1]:
        raise UsageError(f"calibration needs probabilities [N, K] and labels [N], got {shape} and {labels.shape}")
