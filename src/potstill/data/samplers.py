"""Sample ids of each batch: in order, shuffled, class-balanced, or by a curriculum.

``CounterRNG`` draws random numbers as hashes of (seed, field, sample id, view), so that they depend neither on the
order of drawing, nor on the batch, nor on the number of processes.  The hash is splitmix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", 2014), one round for each word.  Shuffling sorts hashes of (seed,
sample id, epoch), so that an epoch's order depends on nothing else.

A curriculum trains on easy images first.  Sources: Bengio et al., "Curriculum Learning" (ICML 2009); Hacohen and
Weinshall, "On The Power of Curriculum Learning in Training Deep Networks" (ICML 2019): scores by transfer, control
orders and balanced classes.
"""

import itertools
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]
Uniform = NDArray[np.float64]

_MASK = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def splitmix64(state: Bits) -> Bits:
    """Return the output of a splitmix64 generator in each of these states; wraps modulo 2**64."""
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def random_bits(seed: int, field: str, ids: NDArray[np.int64], view: NDArray[np.int64] | int) -> Bits:
    """Return 64 random bits, uint64 [B], for sample ids [B] in ``view`` (one or [B]); fields are independent."""
    state = _hash_field(seed, field) ^ np.asarray(ids, dtype=np.int64).view(np.uint64)
    state = splitmix64(state) ^ np.asarray(view, dtype=np.int64).reshape(-1).view(np.uint64)
    return splitmix64(state)


@lru_cache(maxsize=4096)  # every batch uses the same few
def _hash_field(seed: int, field: str) -> np.uint64:
    """Return the hash of (seed, field), which all samples share."""
    state = splitmix64(np.array([seed & _MASK], dtype=np.uint64)) ^ np.uint64(zlib.crc32(field.encode()))
    return np.uint64(splitmix64(state)[0])


def uniform(seed: int, field: str, ids: NDArray[np.int64], view: NDArray[np.int64] | int) -> Uniform:
    """Return float64 [B], uniform in [0, 1): the upper 53 bits of ``random_bits``."""
    return (random_bits(seed, field, ids, view) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derive_seed(seed: int, field: str) -> int:
    """Return a seed that is independent of ``seed``, for a second use of the same fields."""
    return int(random_bits(seed, field, np.zeros(1, dtype=np.int64), 0)[0])


class CounterRNG:
    """Uniform random numbers of a batch: ``CounterRNG(seed, ids, view)(field)`` returns those of one field, [B]."""

    def __init__(self, seed: int, ids: NDArray[np.int64], view: NDArray[np.int64] | int) -> None:
        self.seed, self.ids, self.view = seed, ids, view

    def __call__(self, field: str) -> Uniform:
        """Return float64 [B], uniform in [0, 1)."""
        return uniform(self.seed, field, self.ids, self.view)

    def __len__(self) -> int:
        return len(self.ids)


Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Curriculum:
    """The images that each epoch uses: the first ones of ``order``, more from epoch to epoch."""

    order: Ids  # [N] sample ids, easiest first
    counts: tuple[int, ...]  # number of images by epoch; the last one applies to all later epochs

    def admitted(self, epoch: int) -> Ids:
        """Return the sample ids that an epoch, from 0, uses."""
        return self.order[: self.counts[min(epoch, len(self.counts) - 1)]]


def curriculum_share(epoch: int, epochs: int, *, start: float, until: float) -> float:
    """Return the share of images that an epoch (from 0) uses: it grows linearly from ``start`` to 1, which it has after
    the share ``until`` of ``epochs``.

    Example:
        >>> [round(curriculum_share(epoch, 5, start=0.2, until=0.5), 4) for epoch in range(5)]
        [0.2, 0.6, 1.0, 1.0, 1.0]
    """
    progress = min(epoch / max(epochs - 1, 1) / until, 1.0)
    return start + (1 - start) * progress


def curriculum_order(difficulty: NDArray[np.float64], labels: Ids) -> Ids:
    """Return sample ids [N], easiest first, with the classes in constant proportions.

    In a class with n images, the k-th easiest (from 0) has rank (k + 1/2) / n; of equal ones the smaller id comes
    first.

    Example:
        >>> curriculum_order(np.array([0.9, 0.1, 0.5, 0.2, 0.8]), np.array([0, 0, 0, 1, 1]))
        array([1, 3, 2, 4, 0])
    """
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        easiest = members[np.argsort(difficulty[members], kind="stable")]
        rank[easiest] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(rank, kind="stable").astype(np.int64)


Numbers = NDArray[np.float64]
SampleOrder = Literal["listed", "shuffled", "balanced"]


@dataclass(frozen=True)
class EpochSampler:
    """The sample ids of every epoch's batches; the arguments are those of ``Loader``."""

    labels: Ids  # [N], of the labeled images
    batch_size: int
    order: SampleOrder
    seed: int
    unlabeled: int = 0  # M, number of images without labels; their ids are N to N + M - 1
    unlabeled_share: float = 0.5
    processes: int = 1  # that share each batch
    length: int | None = None  # labeled images per epoch, repeated if there are fewer; None: each once
    curriculum: Curriculum | None = None  # for the order "shuffled"

    @property
    def labeled(self) -> int:
        """Return the labeled images per epoch, less a last batch of a single image, except in the order "listed"."""
        total = len(self.labels) if self.length is None else self.length
        rest = total % self.batch_size
        single = self.order != "listed" and total > rest > 0 and rest < 2 * self.processes and self.batch_size > 1
        return total - rest if single else total

    @property
    def count(self) -> int:
        """Images per epoch, including those without labels."""
        return self.labeled + self._unlabeled_count(self.labeled)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return math.ceil(self.labeled / self.batch_size)

    @property
    def largest_batch(self) -> int:
        """Largest number of images of a batch in one process."""
        labeled = min(self.batch_size, self.labeled)
        unlabeled = math.ceil(labeled * self.unlabeled_share / (1 - self.unlabeled_share)) if self.unlabeled else 0
        total = labeled + unlabeled
        return total if self.order == "listed" else math.ceil(total / self.processes)

    def batches(self, epoch: int) -> list[Ids]:
        """Return the sample ids of each batch, those with labels first."""
        ids = self._in_order(epoch)[: self.labeled]
        batches = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
        if not self.unlabeled:
            return batches
        return [
            np.concatenate([batch, len(self.labels) + cycle_shuffled(self.unlabeled, self.seed, first, last)])
            for batch, (first, last) in zip(batches, self._unlabeled_ranges(epoch), strict=True)
        ]

    def unlabeled_passes(self, epoch: int) -> list[Ids]:
        """Return, for the unlabeled images of each batch in their order, how often each was seen before."""
        return [np.arange(first, last) // self.unlabeled for first, last in self._unlabeled_ranges(epoch)]

    def _unlabeled_ranges(self, epoch: int) -> list[tuple[int, int]]:
        """Return the part of the endless sequence of unlabeled images that belongs to each batch."""
        before = epoch * self._unlabeled_count(self.labeled)
        ends = [before + self._unlabeled_count(at) for at in (*range(0, self.labeled, self.batch_size), self.labeled)]
        return list(itertools.pairwise(ends))

    def _unlabeled_count(self, labeled: int) -> int:
        """Return the number of unlabeled images beside the first ``labeled`` ones of an epoch, for any batch size."""
        return int(labeled * self.unlabeled_share / (1 - self.unlabeled_share) + 0.5) if self.unlabeled else 0

    def _in_order(self, epoch: int) -> Ids:
        if self.order == "shuffled" and self.curriculum is not None:
            ids, total = self.curriculum.admitted(epoch), self.length or len(self.labels)
            return ids[cycle_shuffled(len(ids), self.seed, 0, total, f"curriculum {epoch}")]
        if self.order == "shuffled" and self.length is not None:
            return cycle_shuffled(len(self.labels), self.seed, epoch * self.length, (epoch + 1) * self.length, "order")
        if self.order == "shuffled":
            return shuffle_ids(len(self.labels), self.seed, epoch)
        if self.order == "balanced":
            return sample_balanced(self.labels, self.seed, epoch, self.length)
        return np.arange(len(self.labels), dtype=np.int64)


def shuffle_ids(count: int, seed: int, epoch: int, field: str = "order") -> Ids:
    """Return a permutation of ``count`` sample ids; each ``field`` has its own."""
    return np.argsort(random_bits(seed, field, np.arange(count, dtype=np.int64), epoch), kind="stable")


def sample_balanced(labels: Ids, seed: int, epoch: int, count: int | None = None) -> Ids:
    """Return ``count`` sample ids (None: N), drawn with replacement, each class equally likely."""
    slots = np.arange(len(labels) if count is None else count, dtype=np.int64)
    classes, images = (uniform(seed, f"balanced {field}", slots, epoch) for field in ("class", "image"))
    return ClassIndex(labels).sample(classes, images)


def cycle_shuffled(count: int, seed: int, start: int, stop: int, field: str = "unlabeled order") -> Ids:
    """Return part of an endless sequence of permutations of ``count`` ids; each ``field`` has its own."""
    if stop <= start:
        return np.zeros(0, dtype=np.int64)
    first, last = start // count, (stop - 1) // count
    cycles = [shuffle_ids(count, seed, cycle, field) for cycle in range(first, last + 1)]
    return np.concatenate(cycles)[start - first * count : stop - first * count]


class ClassIndex:
    """Sample ids grouped by class."""

    def __init__(self, labels: Ids) -> None:
        self.grouped = np.argsort(labels, kind="stable")  # [N]
        self.classes, self.counts = np.unique(
            labels, return_counts=True
        )  # classes with images, and their numbers of images
        self.starts = np.cumsum(self.counts) - self.counts  # of each class in `grouped`

    def sample(self, class_draws: Numbers, image_draws: Numbers) -> Ids:
        """Return sample ids [B], given random numbers in [0, 1) for the class and for the image within it, [B]."""
        chosen = (class_draws * len(self.classes)).astype(np.int64)
        position = (image_draws * self.counts[chosen]).astype(np.int64)
        ids: Ids = self.grouped[self.starts[chosen] + position]
        return ids


class SameClassSampler:
    """Draws for each sample another one of its class."""

    def __init__(self, labels: Ids, seed: int) -> None:
        self.seed = seed
        by_class = ClassIndex(labels)
        self.grouped = by_class.grouped
        position = np.searchsorted(by_class.classes, labels)
        self.sizes = by_class.counts[position]  # [N], of each sample's class
        self.starts = by_class.starts[position]  # [N], of its class in `grouped`
        self.ranks = np.empty_like(self.grouped)
        self.ranks[self.grouped] = np.arange(len(labels))
        self.ranks -= self.starts  # [N], within its class

    def __call__(self, ids: Ids, view: Ids | int) -> Ids:
        """Return partners of samples [B], uniform over their classes; itself if the class has no other."""
        others = self.sizes[ids] - 1
        offset = 1 + (uniform(self.seed, "same class", ids, view) * others).astype(np.int64)
        partners: Ids = self.grouped[self.starts[ids] + (self.ranks[ids] + offset) % self.sizes[ids]]
        return partners
