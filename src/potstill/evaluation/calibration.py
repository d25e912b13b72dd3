"""How far a network's confidence can be believed, before and after one temperature for all answers.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
"""

import math
from typing import Any

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array

BINS = 15
_SMALLEST = float(np.finfo(np.float32).tiny)
_COLDEST, _HOTTEST = 0.05, 20.0  # a network that is never wrong on val has no best temperature: it stops here
_STEPS = 40  # of the golden section: the range of log T shrinks to 3e-8


def calibration(val: Array, val_labels: Array, test: Array, test_labels: Array) -> dict[str, Any] | None:
    """What scaling does on test, with the temperature that fits val best.

    ``val`` and ``test`` are probabilities [N, K], the labels whole numbers [N].

    Returns:
        ``temperature``; ``before`` and ``after``, each with ``ece`` (0 to 1), ``nll`` (nats) and ``bins``: for each of
        15 bins of confidence that has images their number, mean confidence and share right.  None where a split
        has no image.

    Raises:
        UsageError: labels that do not go with the probabilities.
    """
    if not len(val) or not len(test):
        return None
    temperature = fit_temperature(val, val_labels)
    return {
        "temperature": temperature,
        "before": _figures(test, test_labels),
        "after": _figures(scaled(test, temperature), test_labels),
    }


def fit_temperature(probabilities: Array, labels: Array) -> float:
    """The temperature in [0.05, 20] that gives the least NLL, by golden section: NLL has one valley in log T.

    Raises:
        UsageError: labels that do not go with the probabilities.
    """
    logs = _logs(probabilities)
    _check(probabilities, labels)
    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = _nll_at(logs, labels, left), _nll_at(logs, labels, right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = _nll_at(logs, labels, left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = _nll_at(logs, labels, right)
    return math.exp((low + high) / 2)


def scaled(probabilities: Array, temperature: float) -> Array:
    """Softmax of the logits divided by ``temperature``; [N, K] probabilities give the logits up to a constant.

    Example:
        >>> scaled(np.array([[0.8, 0.2]]), 0.5).round(3).tolist()
        [[0.941, 0.059]]
    """
    return np.asarray(np.exp(_log_softmax(_logs(probabilities) / temperature)))


def bins(probabilities: Array, labels: Array) -> list[list[float]]:
    """Of each bin (low, high] with images: their number, mean confidence, share right; from least to most confident."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    return [
        [int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())]
        for each in range(BINS)
        if (inside := place == each).any()
    ]


def _figures(probabilities: Array, labels: Array) -> dict[str, Any]:
    found = bins(probabilities, labels)
    wrong_by = sum(images * abs(confidence - right) for images, confidence, right in found)
    picked = _logs(probabilities)[np.arange(len(labels)), labels]
    return {"ece": wrong_by / len(labels), "nll": float(-picked.mean()), "bins": found}


def _nll_at(logs: Array, labels: Array, log_temperature: float) -> float:
    scaled_logs = _log_softmax(logs / math.exp(log_temperature))
    return float(-scaled_logs[np.arange(len(labels)), labels].mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _logs(probabilities: Array) -> Array:
    # What float32 rounded to 0 counts as its smallest number.
    return np.asarray(np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST)))


def _check(probabilities: Array, labels: Array) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise UsageError(
            f"calibration needs probabilities [N, K] and labels [N], got {probabilities.shape} and {labels.shape}"
        )
