"""FedAvg: the clients' weights, averaged by how many images each has.

McMahan and others, "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
https://arxiv.org/abs/1602.05629

Traps:
- Each client counts by its images.  Equal weights let a client with three images speak as loud as one with a thousand.
- BatchNorm's statistics are averaged too.  The variance over all images is not the mean of the clients' variances: how
  far apart their means are belongs to it, and clients that see other classes have other means.  So here it is pooled:
  the mean of ``v_i + (m_i - m)^2``.
- Counts of batches (int64) are no weights; the largest is kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import DataError, UsageError
from potstill.federated.messages import LOGITS, Arrays

_MEAN, _VARIANCE = "running_mean", "running_var"


def average_states(states: Sequence[Arrays], images: Sequence[float]) -> Arrays:
    """One state dict from those of several clients, in float64 inside and in each array's own kind outside.

    Args:
        states: with the same names and shapes.
        images: how many each client has trained on.

    Returns:
        The weighted mean of floats (see above for variances), and the largest of whole numbers.

    Raises:
        UsageError: states that differ in names or shapes.
        DataError: there is none, or no image at all.

    Example:
        >>> one, two = ({"w": np.array([value], np.float32)} for value in (1.0, 5.0))
        >>> average_states([one, two], [3, 1])["w"].tolist()
        [2.0]
    """
    if not states or sum(images) <= 0:
        raise DataError("there is nothing to average: no client has sent weights that come from images")
    _refuse_different(states)
    shares = np.asarray(images, dtype=np.float64) / float(sum(images))
    found: Arrays = {}
    for name, first in states[0].items():
        values = np.stack([state[name] for state in states])
        if first.dtype.kind != "f":
            found[name] = np.asarray(values.max(axis=0))
            continue
        values = values.astype(np.float64)
        mean = name.removesuffix(_VARIANCE) + _MEAN
        if name.endswith(_VARIANCE) and mean in states[0]:
            means = np.stack([state[mean] for state in states]).astype(np.float64)
            values = values + (means - _mean(means, shares)) ** 2
        found[name] = np.asarray(_mean(values, shares)).astype(first.dtype)
    return found


def average_logits(logits: Sequence[NDArray[Any]], images: Sequence[float]) -> NDArray[Any]:
    """The clients' logits [P, K], averaged by how many images each has.

    Raises:
        UsageError: shapes that differ.
        DataError: there are none.
    """
    return average_states([{LOGITS: each} for each in logits], images)[LOGITS]


def _mean(values: NDArray[Any], shares: NDArray[np.float64]) -> NDArray[Any]:
    mean: NDArray[Any] = np.tensordot(shares, values, axes=1)
    return mean


def _refuse_different(states: Sequence[Arrays]) -> None:
    wanted = {name: value.shape for name, value in states[0].items()}
    for number, state in enumerate(states[1:], start=2):
        if {name: value.shape for name, value in state.items()} != wanted:
            raise UsageError(f"client {number} of {len(states)} sent other arrays than the first: networks differ")
