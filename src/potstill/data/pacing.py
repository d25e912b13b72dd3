"""Easy images first: which of them each epoch draws from.

Sources: Bengio et al., "Curriculum Learning" (ICML 2009); Hacohen and Weinshall, "On The Power of Curriculum Learning
in Training Deep Networks" (ICML 2019), of whom are scores by transfer, control orders and classes kept in balance; the
root is the competence of Platanios et al. (NAACL 2019).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.data.settings import Pacing

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Admitted:
    """The images that epochs draw from: the first ones of ``order``, more in each epoch."""

    order: Ids  # [N] sample ids: who is admitted first
    counts: tuple[int, ...]  # of them, by epoch; the last one holds on

    def of(self, epoch: int) -> Ids:
        """Sample ids of an epoch, from 0."""
        return self.order[: self.counts[min(epoch, len(self.counts) - 1)]]


def share_admitted(pacing: Pacing, epoch: int, epochs: int, *, start: float, until: float) -> float:
    """The share of images that an epoch, from 0, draws from.

    Args:
        pacing: "linear"; "root": ever fewer newcomers, so that each has more time; "step": all at once at ``until``.
        epoch: where training stands.
        epochs: of how many.
        start: share in the first epoch, above 0.
        until: share of the training, between its first epoch and its last, after which all are admitted.

    Example:
        >>> [round(share_admitted("linear", epoch, 5, start=0.2, until=0.5), 4) for epoch in range(5)]
        [0.2, 0.6, 1.0, 1.0, 1.0]
        >>> round(share_admitted("root", 1, 5, start=0.2, until=0.5), 4)  # sqrt(0.04 + 0.96 / 2)
        0.7211
    """
    gone = min(epoch / max(epochs - 1, 1) / until, 1.0)
    if gone >= 1.0:
        return 1.0
    if pacing == "step":
        return start
    if pacing == "root":
        return math.sqrt(start**2 + (1 - start**2) * gone)
    return start + (1 - start) * gone


def in_turn(difficulty: NDArray[np.float64], labels: Ids) -> Ids:
    """Sample ids [N], first the easiest; every class enters at the same rate.

    Of a class with n images, the k-th easiest (from 0) stands at place (k + 1/2) / n, whatever the other classes have.

    Args:
        difficulty: [N]; of equal ones the smaller id comes first.
        labels: [N] class ids.

    Example:
        >>> in_turn(np.array([0.9, 0.1, 0.5, 0.2, 0.8]), np.array([0, 0, 0, 1, 1]))
        array([1, 3, 2, 4, 0])
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        easiest = members[np.argsort(difficulty[members], kind="stable")]
        place[easiest] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(place, kind="stable").astype(np.int64)
