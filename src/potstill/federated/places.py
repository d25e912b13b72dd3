"""Which images are public, and which belong to which client, where one machine plays them all."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from potstill.data.images import ImageSet, Subset
from potstill.data.splits import DataSplits
from potstill.errors import DataError, UsageError
from potstill.experiments.seeds import derive
from potstill.federated.own_images import own_images
from potstill.federated.partition import FEWEST, Index, Partition, divide

Images = Callable[[tuple[str, ...]], ImageSet]  # the server's classes -> a client's training images


def with_public(data: DataSplits, share: float, seed: int) -> tuple[DataSplits, ImageSet | None]:
    """The data without the images that become public, and these.

    Args:
        data: with its own unlabeled images, which are the public ones, or without.
        share: of the training images, where there are no unlabeled ones; 0: nothing is public.
        seed: of the recipe; decides which.

    Raises:
        UsageError: the share leaves too few images on one of both sides.
    """
    if data.unlabeled is not None:
        return replace(data, unlabeled=None), data.unlabeled
    if share == 0:
        return data, None
    order = np.random.default_rng(derive(seed, "public") % 2**32).permutation(len(data.train))
    count = round(share * len(order))
    if not FEWEST <= count <= len(order) - FEWEST:
        raise UsageError(
            f"--public {share:g} makes {count} of {len(order)} training images public: at least {FEWEST} must be, and "
            "as many must be left; or name a folder with data.unlabeled"
        )
    return replace(data, train=Subset(data.train, np.sort(order[count:]))), Subset(data.train, np.sort(order[:count]))


def sources_of(train: ImageSet, partition: Partition, clients: int | None, seed: int) -> list[Images]:
    """For each client the way to its images.

    Args:
        train: what is divided, where the clients have no folders.
        partition: how.
        clients: how many; None: 5, or as many as there are folders.
        seed: of the recipe.

    Raises:
        UsageError: a number of clients that does not fit.
        DataError: folders that are not there; a division that leaves a client without images.
    """
    if partition.folders is None:
        parts = divide(train.labels, 5 if clients is None else clients, partition, derive(seed, "partition") % 2**32)
        return [partial(_part, train, part) for part in parts]
    folders = _folders(partition.folders)
    if clients not in (None, len(folders)):
        raise UsageError(f"{partition.folders} holds {len(folders)} folders and --clients is {clients}; leave it out")
    return [partial(own_images, each) for each in folders]


def _part(train: ImageSet, part: Index, classes: tuple[str, ...]) -> ImageSet:
    return Subset(train, part)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"--partition folders:{root}: there is no such folder; it holds one folder for each client")
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no folders; make one for each client, with class folders inside")
    return found
