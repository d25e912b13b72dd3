"""Which images each batch shows: hashes of (seed, sample id, epoch) are sorted, no generator is advanced."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.data.draws import uniform, words
from potstill.data.pacing import Admitted

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]
Order = Literal["listed", "shuffled", "balanced"]


@dataclass(frozen=True)
class Epochs:
    """The batches of every epoch, as sample ids; the arguments are those of ``Loader``."""

    labels: Ids  # [N], of the labeled images
    batch_size: int
    order: Order
    seed: int
    unlabeled: int = 0  # M: how many images without labels; their ids are N to N + M - 1
    unlabeled_share: float = 0.5
    whole_batches: bool = False
    processes: int = 1  # that share each batch
    length: int | None = None  # labeled images per epoch, drawn again where they are fewer; None: each once
    curriculum: Admitted | None = None  # in the order "shuffled": of whom an epoch draws

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
            joined.append(np.concatenate([batch, len(self.labels) + cycled(self.unlabeled, self.seed, first, last)]))
        return joined

    def _unlabeled_beside(self, place: int) -> int:
        """How many unlabeled images go with the first ``place`` labeled ones of an epoch, whatever the batch size."""
        return int(place * self.unlabeled_share / (1 - self.unlabeled_share) + 0.5) if self.unlabeled else 0

    def _in_order(self, epoch: int) -> Ids:
        if self.order == "shuffled" and self.curriculum is not None:
            ids, total = self.curriculum.of(epoch), self.length or len(self.labels)
            return ids[cycled(len(ids), self.seed, 0, total, f"curriculum {epoch}")]
        if self.order == "shuffled" and self.length is not None:
            return cycled(len(self.labels), self.seed, epoch * self.length, (epoch + 1) * self.length, "order")
        if self.order == "shuffled":
            return shuffled(len(self.labels), self.seed, epoch)
        if self.order == "balanced":
            return balanced(self.labels, self.seed, epoch, self.length)
        return np.arange(len(self.labels), dtype=np.int64)


def shuffled(count: int, seed: int, epoch: int, field: str = "order") -> Ids:
    """A permutation of ``count`` sample ids; another ``field``, another permutation."""
    return np.argsort(words(seed, field, np.arange(count, dtype=np.int64), epoch), kind="stable")


def balanced(labels: Ids, seed: int, epoch: int, count: int | None = None) -> Ids:
    """``count`` draws with replacement (None: as many as there are labels [N]), each class equally likely."""
    slots = np.arange(len(labels) if count is None else count, dtype=np.int64)
    classes, images = (uniform(seed, f"balanced {field}", slots, epoch) for field in ("class", "image"))
    return ByClass(labels).choose(classes, images)


def cycled(count: int, seed: int, start: int, stop: int, field: str = "unlabeled order") -> Ids:
    """Places ``start`` to ``stop`` of an endless sequence that shows ``count`` samples again and again, each time all
    of them in a new order; another ``field``, other orders.
    """
    if stop <= start:
        return np.zeros(0, dtype=np.int64)
    first, last = start // count, (stop - 1) // count
    turns = [shuffled(count, seed, turn, field) for turn in range(first, last + 1)]
    return np.concatenate(turns)[start - first * count : stop - first * count]


class ByClass:
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


class Partners:
    """For each sample another one of its class.

    Args:
        labels: [N] class ids.
        seed: of the draws.
    """

    def __init__(self, labels: Ids, seed: int) -> None:
        self.seed = seed
        by_class = ByClass(labels)
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
