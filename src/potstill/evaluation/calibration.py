"""How far a network's confidence can be believed, before and after one temperature for all answers.

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
_MIN_TEMPERATURE, _MAX_TEMPERATURE = (
    0.05,
    20.0,
)  # a network that is never wrong on val has no best temperature: it stops here
_MAX_STEPS, _TOLERANCE = 60, 1e-9  # at most; share of 1 / T by which the last step moves it


def calibration_report(
    val: Probabilities | Array, val_labels: Array, test: Probabilities | Array, test_labels: Array
) -> dict[str, Any] | None:
    """What scaling does on test, with the temperature that fits val best.

    ``val`` and ``test`` are probabilities [N, K], the labels whole numbers [N].

    Returns:
        ``temperature``; ``before`` and ``after``, each with ``ece`` (0 to 1), ``nll`` (nats) and ``reliability_bins``:
        for each of 15 bins of confidence that has images their number, mean confidence and share right.  None where a
        split has no image.

    Raises:
        UsageError: labels that do not go with the probabilities.
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
    """The temperature in [0.05, 20] that gives the least NLL, by Newton's method: NLL is convex in 1 / T.

    Raises:
        UsageError: labels that do not go with the probabilities.
    """
    probabilities = as_probabilities(probabilities)
    _check_inputs(probabilities.shape, labels)
    low, high, inverse = 1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE, 1.0
    for _ in range(_MAX_STEPS):
        slope, curvature = _nll_derivatives(probabilities, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Outside of what is left, or at its end: halve it instead, in logarithms.
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after - inverse) <= _TOLERANCE * inverse:
            inverse = after
            break
        inverse = after
    return 1 / inverse


def _nll_derivatives(probabilities: Probabilities, labels: Array, inverse: float) -> tuple[float, float]:
    """First and second derivative of the NLL with respect to 1 / T."""
    slope = curvature = 0.0
    for which, block in probabilities.blocks():
        logs = _safe_log(block)
        shares = np.exp(_log_softmax(logs * inverse))
        mean = (shares * logs).sum(axis=1)
        slope += float((mean - logs[np.arange(len(logs)), labels[which]]).sum())
        curvature += float(((shares * logs**2).sum(axis=1) - mean**2).sum())
    return slope / probabilities.shape[0], curvature / probabilities.shape[0]


def temperature_scaled(probabilities: Array, temperature: float) -> Array:
    """Softmax of the logits divided by ``temperature``; [N, K] probabilities give the logits up to a constant.

    Example:
        >>> temperature_scaled(np.array([[0.8, 0.2]]), 0.5).round(3).tolist()
        [[0.941, 0.059]]
    """
    return np.asarray(np.exp(_log_softmax(_safe_log(probabilities) / temperature)))


def reliability_bins(probabilities: Array, labels: Array) -> list[list[float]]:
    """Of each bin (low, high] with images: their number, mean confidence, share right; from least to most confident."""
    confidence = probabilities.max(axis=1, initial=0).astype(np.float64)
    return _reliability_bins(confidence, probabilities.argmax(axis=1) == labels)


def _reliability_bins(confidence: Array, right: Array) -> list[list[float]]:
    place = np.clip(np.ceil(confidence * RELIABILITY_BINS) - 1, 0, RELIABILITY_BINS - 1).astype(int)
    return [
        [int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())]
        for each in range(RELIABILITY_BINS)
        if (inside := place == each).any()
    ]


def _calibration_metrics(probabilities: Probabilities, labels: Array, temperature: float) -> dict[str, Any]:
    count = len(labels)
    confidence, right, loss = np.zeros(count), np.zeros(count, dtype=bool), 0.0
    for which, block in probabilities.blocks():
        logs = _safe_log(block) if temperature == 1 else _log_softmax(_safe_log(block) / temperature)
        confidence[which] = block.max(axis=1) if temperature == 1 else np.exp(logs.max(axis=1))
        right[which] = block.argmax(axis=1) == labels[which]
        loss -= float(logs[np.arange(len(logs)), labels[which]].sum())
    found = _reliability_bins(confidence, right)
    wrong_by = sum(images * abs(sure - share) for images, sure, share in found)
    return {"ece": wrong_by / count, "nll": loss / count, "bins": found}


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _safe_log(probabilities: Array) -> Array:
    # What float32 rounded to 0 counts as its smallest number.
    return np.asarray(np.log(np.maximum(probabilities.astype(np.float64), _TINY)))


def _check_inputs(shape: tuple[int, ...], labels: Array) -> None:
    if len(shape) != 2 or labels.shape != shape[:1]:
        raise UsageError(f"calibration needs probabilities [N, K] and labels [N], got {shape} and {labels.shape}")
