"""Partition of the images into public ones and those of each client.

On one machine the training images are divided among the clients; or each client has a folder of its own,
``DIR/<class>/*``, with some of the server's classes, all of it for training.

Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019
(the Dirichlet partition).  https://arxiv.org/abs/1909.06335
"""

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.contrib.federated.client import ImageSource
from potstill.data.file_datasets import raise_refused, read_files
from potstill.data.image_sets import FileSet, ImageSet, Subset
from potstill.data.scan import check_files
from potstill.data.settings import DataSettings
from potstill.data.sources import walk_folder
from potstill.data.splits import DataSplits
from potstill.errors import DataError, UsageError, did_you_mean
from potstill.experiment.plan import derive_seed
from potstill.formatting import format_names

MIN_CLIENT_IMAGES = 2  # BatchNorm cannot train on a single one
_MAX_DRAWS = 200

_LOG = logging.getLogger("potstill")

IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """The partition of the images among clients."""

    alpha: float | None = None  # of the Dirichlet distribution: small if clients differ much; None: identical (iid)
    folders: Path | None = None  # holds one folder for each client

    def __str__(self) -> str:
        if self.folders is not None:
            return f"folders:{self.folders}"
        return "iid" if self.alpha is None else f"dirichlet:{self.alpha:g}"


def parse_partition(text: str) -> Partition:
    """Return the partition that ``iid``, ``dirichlet:ALPHA`` or ``folders:DIR`` describes."""
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
        raise UsageError(f"--partition dirichlet:ALPHA needs a number above 0, such as dirichlet:0.3, got {text!r}")
    raise UsageError(f"--partition is iid, dirichlet:ALPHA (small: clients differ much) or folders:DIR, got {text!r}")


def partition_indices(labels: IndexArray, clients: int, partition: Partition, seed: int) -> list[IndexArray]:
    """Return the sorted positions of each client's images: every image belongs to one client, each has at least two.

    A Dirichlet draw that leaves a client with fewer is repeated, so very uneven divisions are a little more even than
    the distribution.
    """
    if clients < 1:
        raise UsageError(f"--clients must be at least 1, got {clients}")
    if clients * MIN_CLIENT_IMAGES > len(labels):
        raise UsageError(
            f"{len(labels)} training images cannot be divided among {clients} clients with {MIN_CLIENT_IMAGES} or more "
            f"each: take at most {len(labels) // MIN_CLIENT_IMAGES} clients"
        )
    random = np.random.default_rng(seed)
    if partition.alpha is None:
        return [np.sort(part) for part in np.array_split(random.permutation(len(labels)), clients)]
    for _ in range(_MAX_DRAWS):
        parts = _draw_dirichlet(labels, clients, partition.alpha, random)
        if min(map(len, parts)) >= MIN_CLIENT_IMAGES:
            return parts
    raise DataError(
        f"{partition} leaves one of {clients} clients with fewer than {MIN_CLIENT_IMAGES} of {len(labels)} training "
        f"images in each of {_MAX_DRAWS} draws: take fewer clients, dirichlet:{partition.alpha * 3:g}, or iid"
    )


def _draw_dirichlet(labels: IndexArray, clients: int, alpha: float, random: np.random.Generator) -> list[IndexArray]:
    parts: list[list[IndexArray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def load_client_images(
    root: Path, class_names: tuple[str, ...], *, follow_links: bool = False, skip_bad: bool = False
) -> FileSet:
    """Return a client's training images, of some classes; from a folder with train, val and test, those of train."""
    if not root.is_dir():
        raise DataError(f"a client's images: no folder {root}; name one with a folder for each class")
    settings = DataSettings(source=str(root), follow_links=follow_links, skip_bad=skip_bad)
    listing, skipped, contents = read_files(walk_folder(root, follow_links=follow_links), settings)
    if skipped:
        _LOG.warning("%s: %d files are left out, such as %s", root, len(skipped), skipped[0].path)
    entries = [entry for entry in listing.entries if entry.split in (None, "train")]
    shown = format_names([*map(repr, class_names)], most=12)
    if len(entries) < MIN_CLIENT_IMAGES:
        raise DataError(
            f"{root}: this client has {len(entries)} training images, and needs at least {MIN_CLIENT_IMAGES}: put "
            f"them into folders named after their classes ({shown}), or leave the client out"
        )
    raise_refused(settings, listing.findings, root)
    known = {name: label for label, name in enumerate(class_names)}
    unknown = sorted({entry.label for entry in entries} - set(known))
    if unknown:
        raise DataError(
            f"{root}: the server does not know the class{'es' if len(unknown) > 1 else ''} "
            f"{format_names([*map(repr, unknown)], most=12)}{did_you_mean(unknown[0], known)}\n"
            f"It knows {shown}: rename the folder, or move it away"
        )
    images = FileSet(root, [entry.name for entry in entries], [known[entry.label] for entry in entries])
    images.expect(contents or check_files(root, images.names, str(root)))
    return images


def split_public_images(data: DataSplits, share: float, seed: int) -> tuple[DataSplits, ImageSet | None]:
    """Return the data without the images that become public (unlabeled ones, or a share of train), and these."""
    if data.unlabeled is not None:
        return replace(data, unlabeled=None), data.unlabeled
    if share == 0:
        return data, None
    order = np.random.default_rng(derive_seed(seed, "public") % 2**32).permutation(len(data.train))
    count = round(share * len(order))
    if not MIN_CLIENT_IMAGES <= count <= len(order) - MIN_CLIENT_IMAGES:
        raise UsageError(
            f"--public {share:g} makes {count} of {len(order)} training images public: at least {MIN_CLIENT_IMAGES} "
            "must be, and as many must remain; or name a folder with data.unlabeled"
        )
    return replace(data, train=Subset(data.train, np.sort(order[count:]))), Subset(data.train, np.sort(order[:count]))


def client_image_sources(train: ImageSet, partition: Partition, clients: int | None, seed: int) -> list[ImageSource]:
    """Return for each client the function that loads its images; 5 clients by default, or those with folders."""
    if partition.folders is None:
        parts = partition_indices(
            train.labels, 5 if clients is None else clients, partition, derive_seed(seed, "partition") % 2**32
        )
        return [partial(_client_subset, train, part) for part in parts]
    folders = client_folders(partition.folders)
    if clients not in (None, len(folders)):
        raise UsageError(f"{partition.folders} holds {len(folders)} folders and --clients is {clients}; leave it out")
    return [partial(load_client_images, each) for each in folders]


def _client_subset(train: ImageSet, part: IndexArray, classes: tuple[str, ...]) -> ImageSet:
    return Subset(train, part)


def client_folders(root: Path) -> list[Path]:
    """Return the clients' folders in ``root``, sorted by name."""
    if not root.is_dir():
        raise UsageError(f"--partition folders:{root}: no such folder; it must hold one folder for each client")
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no folders; make one for each client, with a folder for each class inside")
    return found
