"""Who has which images: one machine plays all clients, so the training images are divided among them.

Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019
(the Dirichlet partition).  https://arxiv.org/abs/1909.06335
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.errors import DataError, UsageError

FEWEST = 2  # images of a client: batch normalisation cannot train on a single one
_ATTEMPTS = 200

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """How unlike the clients are."""

    alpha: float | None = None  # of the Dirichlet distribution: small for clients that differ much; None: all alike
    folders: Path | None = None  # each folder in here is a client's own

    def __str__(self) -> str:
        if self.folders is not None:
            return f"folders:{self.folders}"
        return "iid" if self.alpha is None else f"dirichlet:{self.alpha:g}"


def parse_partition(text: str) -> Partition:
    """``iid``, ``dirichlet:ALPHA`` or ``folders:DIR``.

    Raises:
        UsageError: anything else; says what is allowed.

    Example:
        >>> parse_partition("dirichlet:0.3").alpha
        0.3
    """
    kind, _, value = text.partition(":")
    if kind == "iid" and not value:
        return Partition()
    if kind == "folders" and value:
        return Partition(folders=Path(value).expanduser())
    if kind == "dirichlet":
        try:
            alpha = float(value)
        except ValueError:
            alpha = math.nan
        if 0 < alpha < math.inf:
            return Partition(alpha)
        raise UsageError(f"--partition dirichlet:ALPHA wants a number above 0 such as dirichlet:0.3, got {text!r}")
    raise UsageError(
        f"--partition is iid, dirichlet:ALPHA (0.1: clients differ much; 100: hardly) or folders:DIR, got {text!r}"
    )


def divide(labels: Index, clients: int, partition: Partition, seed: int) -> list[Index]:
    """Positions of each client's images: every image belongs to one client, and each client has two or more.

    A Dirichlet draw that leaves a client with less is drawn again, so that very uneven divisions come out a little
    more even than the distribution is.

    Args:
        labels: [N] class ids.
        clients: how many.
        partition: how unlike they are.
        seed: another seed gives another division; the same one the same.

    Returns:
        For each client sorted positions, [n_i] with the sum N.

    Raises:
        UsageError: more clients than the images are enough for.
        DataError: no draw gives every client enough.
    """
    if clients < 1:
        raise UsageError(f"--clients must be at least 1, got {clients}")
    if clients * FEWEST > len(labels):
        raise UsageError(
            f"{len(labels)} training images cannot be divided among {clients} clients, {FEWEST} or more each: "
            f"at most {len(labels) // FEWEST} clients"
        )
    random = np.random.default_rng(seed)
    if partition.alpha is None:
        return [np.sort(part) for part in np.array_split(random.permutation(len(labels)), clients)]
    for _ in range(_ATTEMPTS):
        parts = _draw(labels, clients, partition.alpha, random)
        if min(map(len, parts)) >= FEWEST:
            return parts
    raise DataError(
        f"{partition} leaves one of {clients} clients without {FEWEST} of the {len(labels)} training images, in each "
        f"of {_ATTEMPTS} draws: take fewer clients, a larger alpha (dirichlet:{partition.alpha * 3:g}), or iid"
    )


def _draw(labels: Index, clients: int, alpha: float, random: np.random.Generator) -> list[Index]:
    """Class by class: shuffled, and cut where the cumulative shares of a Dirichlet draw say."""
    parts: list[list[Index]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]
