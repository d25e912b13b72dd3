"""Fashion-MNIST: 60,000 + 10,000 photographs of clothes, 28x28 gray, ten classes (Xiao et al., 2017; MIT)."""

import gzip
import hashlib
import math
import urllib.request
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from potstill.data.builtin import split_published
from potstill.data.image_sets import ArraySet
from potstill.data.settings import AugmentSettings, DataSettings, Options, read_options
from potstill.data.splits import DataSplits
from potstill.errors import DataError, UsageError
from potstill.io import write_bytes

AUGMENT = AugmentSettings(pad_crop=0.1, hflip=True)

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
_SECONDS = 5.0  # to wait for a download to answer


class FashionOptions(Options):
    """Where the files are, and how many of them."""

    root: str | None = None  # a folder with the four .gz files
    limit: Annotated[int, Field(ge=30, le=60_000)] | None = None  # images to use of the 60,000, before val is split off


def fashion_mnist(settings: DataSettings) -> DataSplits:
    """Return train and val from the 60,000 (``limit`` of them: stratified, by split_seed), test the 10,000."""
    options = read_options(settings, FashionOptions)
    root = _root(options)
    train, test = _read_split(root, "train"), _read_split(root, "test")
    return split_published(settings, CLASS_NAMES, train, test, limit=options.limit, augment=AUGMENT)


def check(settings: DataSettings) -> None:
    """Check options and folder, without reading images."""
    options = read_options(settings, FashionOptions)
    if options.root is not None and not _complete(Path(options.root)):
        raise UsageError(_missing(Path(options.root)))


def _root(options: FashionOptions) -> Path:
    if options.root is not None:
        if not _complete(Path(options.root)):
            raise UsageError(_missing(Path(options.root)))
        return Path(options.root)
    cache = Path.home() / ".cache" / "potstill" / "fashion-mnist"
    for folder in (SYSTEM, cache):
        if _complete(folder):
            return folder
    _download(cache)
    return cache


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for names in FILES.values() for name in names)


def _missing(folder: Path) -> str:
    lacking = [name for names in FILES.values() for name in names if not (folder / name).is_file()]
    return f"data set 'fashion-mnist': {folder} has no {', '.join(lacking)}"


def _download(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    for name, md5 in FashionMNIST.resources:
        try:
            with urllib.request.urlopen(FashionMNIST.mirrors[0] + name, timeout=_SECONDS) as answer:  # nosec B310 # torchvision's address
                content: bytes = answer.read()
        except OSError as error:
            raise UsageError(
                f"data set 'fashion-mnist' is not on this machine and cannot be downloaded ({error})\n"
                "Install the Debian package dataset-fashion-mnist, or give the folder of its four .gz files: "
                "--set data.options.root=DIR"
            ) from error
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{name}: the download is damaged; try again")
        write_bytes(folder / name, content)


def _read_split(root: Path, split: str) -> ArraySet:
    images_file, labels_file = FILES[split]
    images, labels = _read_idx(root / images_file, 3), _read_idx(root / labels_file, 1)
    if len(images) != len(labels) or labels.max(initial=0) >= len(CLASS_NAMES):
        raise DataError(f"{root}: {len(images)} images and {len(labels)} labels of {split} do not match")
    return ArraySet(images, labels.astype(np.int64), [f"fashion-mnist/{split}/{i:05d}" for i in range(len(images))])


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file: two zero bytes, type 8 (uint8), number of dimensions, their big-endian sizes, the values."""
    try:
        with gzip.open(path) as file:
            content = file.read(2**28)  # more than four times what the largest file holds
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    start = 4 + 4 * dimensions
    sizes: list[int] = np.frombuffer(content[4:start][: len(content[4:start]) // 4 * 4], dtype=">u4").tolist()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(sizes):
        raise DataError(f"{path}: damaged (no IDX file of {dimensions} dimensions)")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes)
