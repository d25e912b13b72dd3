r"""The 16 largest logits and the mass of the others at four temperatures: enough for any softened distribution.

With :math:`d_i = z_i - \max z` and the tail being all but the 16 largest, the tail's mass is
:math:`m(T) = \sum_{tail} e^{d_i / T}`.  Its logarithm as a function of :math:`\beta = 1 / T` is convex, is known
exactly at :math:`\beta = 0` (the logarithm of the number of classes in the tail), and is kept at T = 8, 4, 2 and 1.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

TOP = 16
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
_KNOWN = np.array([0.0, *(1 / t for t in reversed(TEMPERATURES))])  # beta, rising

Floats = NDArray[np.float32]


def fields(classes: int) -> list[tuple[str, str, int]]:
    """Name, kind and size of each field of a record."""
    return [("index", "<u2" if classes <= 1 << 16 else "<u4", TOP), ("logits", "<f2", TOP), ("tail", "<f2", 4)]


def split(differences: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """What is kept of ``z - max z``, shape [B, K].

    Returns:
        The classes of the 16 largest, largest first; their differences; log m(T) for each of ``TEMPERATURES``.
    """
    top = np.argpartition(-differences, TOP - 1, axis=1)[:, :TOP]
    order = np.lexsort((top, -np.take_along_axis(differences, top, axis=1)), axis=1)  # of equals, the lower class
    top = np.take_along_axis(top, order, axis=1)
    kept = np.take_along_axis(differences, top, axis=1)
    others = differences.copy()
    np.put_along_axis(others, top, -np.inf, axis=1)
    highest = others.max(axis=1, keepdims=True)
    power = np.exp((others - highest) / TEMPERATURES[-1])
    masses = []
    for temperature in reversed(TEMPERATURES):  # the next lower temperature: each power squared
        masses.append(np.log(power.sum(axis=1)) + highest[:, 0] / temperature)
        power *= power
    return top, kept, np.stack(masses[::-1], axis=1)


def join(index: NDArray[np.int64], kept: Floats, tail: Floats, *, classes: int, temperature: float) -> Floats:
    """Logits [B, K] whose softmax at T gives the 16 largest their shares, and the others together theirs.

    Args:
        index: shape [B, 16].
        kept: their differences, shape [B, 16].
        tail: log m(T) at ``TEMPERATURES``, shape [B, 4].
        classes: K.
        temperature: T > 0.

    Returns:
        The others are all equal, and never above the smallest of the 16.
    """
    others = classes - TOP
    level = temperature * (log_mass(tail, others, temperature) - np.log(others))
    logits = np.empty((len(index), classes), np.float32)
    logits[:] = np.minimum(level, kept[:, -1])[:, None]
    np.put_along_axis(logits, index, kept, axis=1)
    return logits


def log_mass(tail: Floats, others: int, temperature: float) -> NDArray[np.float64]:
    """Log m(T) at any T; shape [B].

    At one of ``TEMPERATURES``, what was kept.  Between them, the polynomial through the five known points, held within
    what convexity allows.  Below T = 1, the straight line on from T = 2 and 1 or steeper, as the polynomial goes there,
    but no higher than the norm's bound, ``log m(T) <= log m(1) / T``.

    Args:
        tail: log m at ``TEMPERATURES``, shape [B, 4].
        others: number of classes in the tail.
        temperature: T > 0.
    """
    known = np.concatenate([np.full((len(tail), 1), np.log(others)), tail[:, ::-1]], axis=1).astype(np.float64)
    beta = 1 / temperature
    at = np.flatnonzero(beta == _KNOWN)
    if len(at):
        return np.asarray(known[:, at[0]])
    slopes = np.diff(known, axis=1) / np.diff(_KNOWN)
    if beta > 1:
        lowest = known[:, -1] + (beta - 1) * slopes[:, -1]
        steepest = known[:, -1] + (beta - 1) * _slope_at_one(known)
        bound = np.maximum(beta * known[:, -1], lowest)
        return np.asarray(np.minimum(np.maximum(lowest, steepest), bound))
    right = int(np.searchsorted(_KNOWN, beta))
    left = right - 1
    lowest = np.full(len(tail), -np.inf)
    if left > 0:
        lowest = known[:, left] + (beta - _KNOWN[left]) * slopes[:, left - 1]
    if right < len(_KNOWN) - 1:
        lowest = np.maximum(lowest, known[:, right] + (beta - _KNOWN[right]) * slopes[:, right])
    highest = known[:, left] + (beta - _KNOWN[left]) * slopes[:, left]
    return np.asarray(np.minimum(np.maximum(_polynomial(known, beta), lowest), highest))


def _polynomial(known: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Lagrange's form."""
    weights = [
        np.prod([(beta - other) / (node - other) for other in _KNOWN if other != node]) for node in _KNOWN.tolist()
    ]
    found: NDArray[np.float64] = known @ np.array(weights)
    return found


def _slope_at_one(known: NDArray[np.float64]) -> NDArray[np.float64]:
    """The parabola through the last three points, there."""
    (a, b), (b_, c) = itertools.pairwise(_KNOWN[-3:].tolist())
    assert b == b_
    first, last = (known[:, -2] - known[:, -3]) / (b - a), (known[:, -1] - known[:, -2]) / (c - b)
    found: NDArray[np.float64] = last + (last - first) * (c - b) / (c - a)
    return found
