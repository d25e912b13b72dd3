"""Counter-based random numbers: pure functions of seed, field, sample id and view.

A number is the hash of (seed, field, sample id, view), so that it depends neither on the order of drawing, nor on the
batch, nor on the number of processes.  The hash is splitmix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", 2014), one round for each word.
"""

import zlib
from functools import lru_cache

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
    """Return 64 random bits for each sample.

    Args:
        seed: of the run.
        field: name of the quantity, such as "hflip"; fields are independent of each other.
        ids: [B] sample ids.
        view: view number, one for all or [B].

    Returns:
        uint64 [B].
    """
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
