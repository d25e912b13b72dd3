"""Sample ids of each batch: in order, shuffled, class-balanced, or by a curriculum.

Hashes of (seed, sample id, epoch) are sorted; no generator is advanced.

A curriculum draws from easy images first.  Sources: Bengio et al., "Curriculum Learning" (ICML 2009); Hacohen and
Weinshall, "On The Power of Curriculum Learning in Training Deep Networks" (ICML 2019), of whom are scores by transfer,
control orders and classes kept in balance; the root is the competence of Platanios et al. (NAACL 2019).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.data.counter_rng import random_bits, uniform
from potstill.data.settings import Pacing

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Curriculum:
    """The images that epochs draw from: the first ones of ``order``, more in each epoch."""

    order: Ids  # [N] sample ids: who is admitted first
    counts: tuple[int, ...]  # of them, by epoch; the last one holds on

    def of(self, epoch: int) -> Ids:
        """Sample ids of an epoch, from 0."""
        return self.order[: self.counts[min(epoch, len(self.counts) - 1)]]


def curriculum_share(pacing: Pacing, epoch: int, epochs: int, *, start: float, until: float) -> float:
    """The share of images that an epoch, from 0, draws from.

    Args:
        pacing: "linear"; "root": ever fewer newcomers, so that each has more time; "step": all at once at ``until``.
        epoch: where training stands.
        epochs: of how many.
        start: share in the first epoch, above 0.
        until: share of the training, between its first epoch and its last, after which all are admitted.

    Example:
        >>> [round(curriculum_share("linear", epoch, 5, start=0.2, until=0.5), 4) for epoch in range(5)]
        [0.2, 0.6, 1.0, 1.0, 1.0]
        >>> round(curriculum_share("root", 1, 5, start=0.2, until=0.5), 4)  # sqrt(0.04 + 0.96 / 2)
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


def curriculum_order(difficulty: NDArray[np.float64], labels: Ids) -> Ids:
    """Sample ids [N], first the easiest; every class enters at the same rate.

    Of a class with n images, the k-th easiest (from 0) stands at place (k + 1/2) / n, whatever the other classes have.

    Args:
        difficulty: [N]; of equal ones the smaller id comes first.
        labels: [N] class ids.

    Example:
        >>> curriculum_order(np.array([0.9, 0.1, 0.5, 0.2, 0.8]), np.array([0, 0, 0, 1, 1]))
        array([1, 3, 2, 4, 0])
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        easiest = members[np.argsort(difficulty[members], kind="stable")]
        place[easiest] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(place, kind="stable").astype(np.int64)


Numbers = NDArray[np.float64]
SampleOrder = Literal["listed", "shuffled", "balanced"]


@dataclass(frozen=True)
class EpochSampler:
    """The batches of every epoch, as sample ids; the arguments are those of ``Loader``."""

    labels: Ids  # [N], of the labeled images
    batch_size: int
    order: SampleOrder
    seed: int
    unlabeled: int = 0  # M: how many images without labels; their ids are N to N + M - 1
    unlabeled_share: float = 0.5
    whole_batches: bool = False
    processes: int = 1  # that share each batch
    length: int | None = None  # labeled images per epoch, drawn again where they are fewer; None: each once
    curriculum: Curriculum | None = None  # in the order "shuffled": of whom an epoch draws

    @property
    def labeled(self) -> int:
        """Labeled images per epoch: a last batch in which a process would have a single one is left out, unless they
        are all to be evaluated.
        """
        total = len(self.labels) if self.length is None else self.length
        rest = total % self.batch_size
        if self.whole_batches:
            return total - rest
        lonely = self.order != "listed" and total > rest > 0 and rest < 2 * self.processes and self.batch_size > 1
        return total - rest if lonely else total

    @property
    def count(self) -> int:
        """Images per epoch, those without labels included."""
        return self.labeled + self._unlabeled_beside(self.labeled)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return math.ceil(self.labeled / self.batch_size)

    @property
    def largest(self) -> int:
        """Images that one process has at most of a batch."""
        labeled = min(self.batch_size, self.labeled)
        more = math.ceil(labeled * self.unlabeled_share / (1 - self.unlabeled_share)) if self.unlabeled else 0
        return labeled + more if self.order == "listed" else math.ceil((labeled + more) / self.processes)

    def batches(self, epoch: int) -> list[Ids]:
        """Sample ids of each batch: first the labeled ones, then the others."""
        ids = self._in_order(epoch)[: self.labeled]
        batches = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
        if not self.unlabeled:
            return batches
        before, joined = epoch * self._unlabeled_beside(self.labeled), []
        for start, batch in zip(range(0, len(ids), self.batch_size), batches, strict=True):
            first, last = (before + self._unlabeled_beside(place) for place in (start, start + len(batch)))
            joined.append(
                np.concatenate([batch, len(self.labels) + cycle_shuffled(self.unlabeled, self.seed, first, last)])
            )
        return joined

    def _unlabeled_beside(self, place: int) -> int:
        """How many unlabeled images go with the first ``place`` labeled ones of an epoch, whatever the batch size."""
        return int(place * self.unlabeled_share / (1 - self.unlabeled_share) + 0.5) if self.unlabeled else 0

    def _in_order(self, epoch: int) -> Ids:
        if self.order == "shuffled" and self.curriculum is not None:
            ids, total = self.curriculum.of(epoch), self.length or len(self.labels)
            return ids[cycle_shuffled(len(ids), self.seed, 0, total, f"curriculum {epoch}")]
        if self.order == "shuffled" and self.length is not None:
            return cycle_shuffled(len(self.labels), self.seed, epoch * self.length, (epoch + 1) * self.length, "order")
        if self.order == "shuffled":
            return shuffle_ids(len(self.labels), self.seed, epoch)
        if self.order == "balanced":
            return sample_balanced(self.labels, self.seed, epoch, self.length)
        return np.arange(len(self.labels), dtype=np.int64)


def shuffle_ids(count: int, seed: int, epoch: int, field: str = "order") -> Ids:
    """A permutation of ``count`` sample ids; another ``field``, another permutation."""
    return np.argsort(random_bits(seed, field, np.arange(count, dtype=np.int64), epoch), kind="stable")


def sample_balanced(labels: Ids, seed: int, epoch: int, count: int | None = None) -> Ids:
    """``count`` draws with replacement (None: as many as there are labels [N]), each class equally likely."""
    slots = np.arange(len(labels) if count is None else count, dtype=np.int64)
    classes, images = (uniform(seed, f"balanced {field}", slots, epoch) for field in ("class", "image"))
    return ClassIndex(labels).choose(classes, images)


def cycle_shuffled(count: int, seed: int, start: int, stop: int, field: str = "unlabeled order") -> Ids:
    """Places ``start`` to ``stop`` of an endless sequence that shows ``count`` samples again and again, each time all
    of them in a new order; another ``field``, other orders.
    """
    if stop <= start:
        return np.zeros(0, dtype=np.int64)
    first, last = start // count, (stop - 1) // count
    turns = [shuffle_ids(count, seed, turn, field) for turn in range(first, last + 1)]
    return np.concatenate(turns)[start - first * count : stop - first * count]


class ClassIndex:
    """Sample ids, class by class.

    Args:
        labels: [N] class ids.
    """

    def __init__(self, labels: Ids) -> None:
        self.grouped = np.argsort(labels, kind="stable")  # [N]
        self.classes, self.counts = np.unique(labels, return_counts=True)  # that have images, and how many
        self.starts = np.cumsum(self.counts) - self.counts  # where each begins in `grouped`

    def choose(self, of_class: Numbers, of_image: Numbers) -> Ids:
        """Sample ids [B]: the class by the first, the image within it by the second number in [0, 1), [B] each."""
        chosen = (of_class * len(self.classes)).astype(np.int64)
        place = (of_image * self.counts[chosen]).astype(np.int64)
        ids: Ids = self.grouped[self.starts[chosen] + place]
        return ids


class SameClassSampler:
    """For each sample another one of its class.

    Args:
        labels: [N] class ids.
        seed: of the draws.
    """

    def __init__(self, labels: Ids, seed: int) -> None:
        self.seed = seed
        by_class = ClassIndex(labels)
        self.grouped = by_class.grouped
        place = np.searchsorted(by_class.classes, labels)
        self.sizes = by_class.counts[place]  # [N]: of each sample's class
        self.starts = by_class.starts[place]  # [N]: where its class begins in `grouped`
        self.places = np.empty_like(self.grouped)
        self.places[self.grouped] = np.arange(len(labels))
        self.places -= self.starts  # [N]: within its class

    def __call__(self, ids: Ids, view: Ids | int) -> Ids:
        """Partners of samples ``ids`` [B], each other member of the class equally likely; itself only where the class
        has no other.
        """
        others = self.sizes[ids] - 1
        ahead = 1 + (uniform(self.seed, "same class", ids, view) * others).astype(np.int64)
        partners: Ids = self.grouped[self.starts[ids] + (self.places[ids] + ahead) % self.sizes[ids]]
        return partners
