"""How far a network's confidence can be believed, before and after one temperature for all answers.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
"""

import math
from typing import Any

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array
from potstill.evaluation.predictions import Rows, as_rows

BINS = 15
_SMALLEST = float(np.finfo(np.float32).tiny)
_COLDEST, _HOTTEST = 0.05, 20.0  # a network that is never wrong on val has no best temperature: it stops here
_STEPS, _CLOSE = 60, 1e-9  # at most; share of 1 / T by which the last step moves it


def calibration(val: Rows | Array, val_labels: Array, test: Rows | Array, test_labels: Array) -> dict[str, Any] | None:
    """What scaling does on test, with the temperature that fits val best.

    ``val`` and ``test`` are probabilities [N, K], the labels whole numbers [N].

    Returns:
        ``temperature``; ``before`` and ``after``, each with ``ece`` (0 to 1), ``nll`` (nats) and ``bins``: for each of
        15 bins of confidence that has images their number, mean confidence and share right.  None where a split
        has no image.

    Raises:
        UsageError: labels that do not go with the probabilities.
    """
    val, test = as_rows(val), as_rows(test)
    if not val.shape[0] or not test.shape[0]:
        return None
    temperature = fit_temperature(val, val_labels)
    return {
        "temperature": temperature,
        "before": _figures(test, test_labels, 1.0),
        "after": _figures(test, test_labels, temperature),
    }


def fit_temperature(probabilities: Rows | Array, labels: Array) -> float:
    """The temperature in [0.05, 20] that gives the least NLL, by Newton's method: NLL is convex in 1 / T.

    Raises:
        UsageError: labels that do not go with the probabilities.
    """
    probabilities = as_rows(probabilities)
    _check(probabilities.shape, labels)
    low, high, inverse = 1 / _HOTTEST, 1 / _COLDEST, 1.0
    for _ in range(_STEPS):
        slope, curvature = _slope(probabilities, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Outside of what is left, or at its end: halve it instead, in logarithms.
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after - inverse) <= _CLOSE * inverse:
            inverse = after
            break
        inverse = after
    return 1 / inverse


def _slope(probabilities: Rows, labels: Array, inverse: float) -> tuple[float, float]:
    """First and second derivative of the NLL with respect to 1 / T."""
    slope = curvature = 0.0
    for which, block in probabilities.blocks():
        logs = _logs(block)
        shares = np.exp(_log_softmax(logs * inverse))
        mean = (shares * logs).sum(axis=1)
        slope += float((mean - logs[np.arange(len(logs)), labels[which]]).sum())
        curvature += float(((shares * logs**2).sum(axis=1) - mean**2).sum())
    return slope / probabilities.shape[0], curvature / probabilities.shape[0]


def scaled(probabilities: Array, temperature: float) -> Array:
    """Softmax of the logits divided by ``temperature``; [N, K] probabilities give the logits up to a constant.

    Example:
        >>> scaled(np.array([[0.8, 0.2]]), 0.5).round(3).tolist()
        [[0.941, 0.059]]
    """
    return np.asarray(np.exp(_log_softmax(_logs(probabilities) / temperature)))


def bins(probabilities: Array, labels: Array) -> list[list[float]]:
    """Of each bin (low, high] with images: their number, mean confidence, share right; from least to most confident."""
    confidence = probabilities.max(axis=1, initial=0).astype(np.float64)
    return _bins(confidence, probabilities.argmax(axis=1) == labels)


def _bins(confidence: Array, right: Array) -> list[list[float]]:
    place = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    return [
        [int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())]
        for each in range(BINS)
        if (inside := place == each).any()
    ]


def _figures(probabilities: Rows, labels: Array, temperature: float) -> dict[str, Any]:
    count = len(labels)
    confidence, right, loss = np.zeros(count), np.zeros(count, dtype=bool), 0.0
    for which, block in probabilities.blocks():
        logs = _logs(block) if temperature == 1 else _log_softmax(_logs(block) / temperature)
        confidence[which] = block.max(axis=1) if temperature == 1 else np.exp(logs.max(axis=1))
        right[which] = block.argmax(axis=1) == labels[which]
        loss -= float(logs[np.arange(len(logs)), labels[which]].sum())
    found = _bins(confidence, right)
    wrong_by = sum(images * abs(sure - share) for images, sure, share in found)
    return {"ece": wrong_by / count, "nll": loss / count, "bins": found}


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _logs(probabilities: Array) -> Array:
    # What float32 rounded to 0 counts as its smallest number.
    return np.asarray(np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST)))


def _check(shape: tuple[int, ...], labels: Array) -> None:
    if len(shape) != 2 or labels.shape != shape[:1]:
        raise UsageError(f"calibration needs probabilities [N, K] and labels [N], got {shape} and {labels.shape}")
