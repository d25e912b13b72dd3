"""Calibration of a network's confidence, before and after temperature scaling.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
"""

import math
from typing import Any

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.classification import Array
from potstill.evaluation.predictions import Probabilities, as_probabilities

RELIABILITY_BINS = 15
_TINY = float(np.finfo(np.float32).tiny)
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0  # the optimum is 0 for a network without errors on val
_MAX_STEPS, _TOLERANCE = 60, 1e-9  # of Newton's method; tolerance relative to 1 / T


def calibration_report(
    val: Probabilities | Array, val_labels: Array, test: Probabilities | Array, test_labels: Array
) -> dict[str, Any] | None:
    """Return calibration metrics on test before and after scaling with the temperature fitted on val.

    ``val`` and ``test`` are probabilities [N, K], the labels integers [N].

    Returns:
        ``temperature``; ``before`` and ``after``, each with ``ece`` (0 to 1), ``nll`` (nats) and ``bins``: for each of
        15 bins of confidence with images their number, mean confidence and accuracy.  None if a split has no images.

    Raises:
        UsageError: shapes of labels and probabilities do not match.
    """
    val, test = as_probabilities(val), as_probabilities(test)
    if not val.shape[0] or not test.shape[0]:
        return None
    temperature = fit_temperature(val, val_labels)
    return {
        "temperature": temperature,
        "before": _calibration_metrics(test, test_labels, 1.0),
        "after": _calibration_metrics(test, test_labels, temperature),
    }


def fit_temperature(probabilities: Probabilities | Array, labels: Array) -> float:
    """Return the temperature in [0.05, 20] of minimal NLL, by Newton's method: NLL is convex in 1 / T.

    Raises:
        UsageError: shapes of labels and probabilities do not match.
    """
    probabilities = as_probabilities(probabilities)
    _check_inputs(probabilities.shape, labels)
    low, high, inverse = 1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE, 1.0
    for _ in range(_MAX_STEPS):
        slope, curvature = _nll_derivatives(probabilities, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Bisect in logarithms if Newton's step leaves the bracket.
        previous, inverse = inverse, step if low < step < high else math.sqrt(low * high)
        if abs(inverse - previous) <= _TOLERANCE * previous:
            break
    return 1 / inverse


def _nll_derivatives(probabilities: Probabilities, labels: Array, inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of the NLL with respect to 1 / T."""
    slope = curvature = 0.0
    for rows, block in probabilities.blocks():
        logs = _safe_log(block)
        scaled = np.exp(_log_softmax(logs * inverse))
        mean = (scaled * logs).sum(axis=1)
        slope += float((mean - logs[np.arange(len(logs)), labels[rows]]).sum())
        curvature += float(((scaled * logs**2).sum(axis=1) - mean**2).sum())
    return slope / probabilities.shape[0], curvature / probabilities.shape[0]


def temperature_scaled(probabilities: Array, temperature: float) -> Array:
    """Return the softmax of logits / temperature from the probabilities [N, K], whose logarithms serve as logits.

    Example:
        >>> temperature_scaled(np.array([[0.8, 0.2]]), 0.5).round(3).tolist()
        [[0.941, 0.059]]
    """
    return np.asarray(np.exp(_log_softmax(_safe_log(probabilities) / temperature)))


def reliability_bins(probabilities: Array, labels: Array) -> list[list[float]]:
    """Return number of images, mean confidence and accuracy of each non-empty bin (low, high], by confidence."""
    confidence = probabilities.max(axis=1, initial=0).astype(np.float64)
    return _reliability_bins(confidence, probabilities.argmax(axis=1) == labels)


def _reliability_bins(confidence: Array, correct: Array) -> list[list[float]]:
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
    bins = _reliability_bins(confidence, correct)
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
