"""CIFAR-100: 50,000 + 10,000 colour photographs of 32x32 pixels, a hundred classes (Krizhevsky, 2009).

The folders ``cifar-100-binary`` and ``cifar-100-python`` of https://www.cs.toronto.edu/~kriz/cifar.html are read;
nothing but arrays, lists and text is taken from the pickles of the second, so that a forged one cannot run code.
"""

import hashlib
import io
import pickle  # nosec B403 # read by a class of ours that accepts arrays, lists and text
import tarfile
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from potstill.data.builtin import split_published
from potstill.data.image_sets import ArraySet
from potstill.data.settings import AugmentSettings, DataSettings, Options, read_options
from potstill.data.splits import DataSplits
from potstill.errors import DataError, UsageError
from potstill.io import write_bytes

AUGMENT = AugmentSettings(pad_crop=0.125, hflip=True)  # 4 of 32 pixels

CLASSES, SIDE = 100, 32
FILES = {  # of each form: training images, test images, class names
    "cifar-100-binary": ("train.bin", "test.bin", "fine_label_names.txt"),
    "cifar-100-python": ("train", "test", "meta"),
}
_LARGEST = 2**28  # bytes; a whole training file has 154 million
_SECONDS = 10.0  # to wait for a download to answer

Found = tuple[NDArray[np.uint8], NDArray[np.int64]]


class CifarOptions(Options):
    """Where the files are, and how many images of them."""

    root: str | None = None  # a folder with cifar-100-binary or cifar-100-python in it, or one of these itself
    limit: Annotated[int, Field(ge=300, le=50_000)] | None = None  # of the 50,000, before val is split off


def cifar100(settings: DataSettings) -> DataSplits:
    """Return train and val from the 50,000 (``limit`` of them: stratified, by split_seed), test the 10,000."""
    options = read_options(settings, CifarOptions)
    folder = _find(options) or _download(_cache())
    class_names, sets = _read(folder)
    return split_published(settings, class_names, sets["train"], sets["test"], limit=options.limit, augment=AUGMENT)


def check(settings: DataSettings) -> None:
    """Check options and folder, without reading images."""
    _find(read_options(settings, CifarOptions))


def _find(options: CifarOptions) -> Path | None:
    if options.root is None:
        return _within(_cache())
    found = _within(Path(options.root).expanduser())
    if found is None:
        raise UsageError(
            f"data set 'cifar100': {options.root} holds neither cifar-100-binary (train.bin, test.bin, "
            "fine_label_names.txt) nor cifar-100-python (train, test, meta)"
        )
    return found


def _within(root: Path) -> Path | None:
    for form, files in FILES.items():
        for folder in (root / form, root):
            if all((folder / name).is_file() for name in files):
                return folder
    return None


def _cache() -> Path:
    return Path.home() / ".cache" / "potstill" / "cifar100"


def _download(root: Path) -> Path:
    from torchvision.datasets import CIFAR100

    try:
        with urllib.request.urlopen(CIFAR100.url, timeout=_SECONDS) as answer:  # nosec B310 # torchvision's address
            content: bytes = answer.read(_LARGEST)
    except OSError as error:
        raise UsageError(
            f"data set 'cifar100' is not on this machine and cannot be downloaded ({error})\n"
            f"Fetch {CIFAR100.url} on another machine, unpack it, and give the folder: --set data.options.root=DIR"
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != CIFAR100.tgz_md5:
        raise DataError(f"{CIFAR100.filename}: the download is damaged; try again")
    folder = root / "cifar-100-python"
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in FILES["cifar-100-python"]:
            file = archive.extractfile(f"cifar-100-python/{name}")
            assert file is not None  # the checksum is that of an archive with these files
            write_bytes(folder / name, file.read())
    return folder


def _read(folder: Path) -> tuple[tuple[str, ...], dict[str, ArraySet]]:
    if (folder / "train.bin").is_file():
        train, test, meta = FILES["cifar-100-binary"]
        names = _bytes(folder / meta).decode("utf-8", "replace").split()
        read = _read_binary
    else:
        train, test, meta = FILES["cifar-100-python"]
        names = _mapping(folder / meta).get("fine_label_names", [])
        read = _read_pickled
    if len(names) != CLASSES or not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder / meta}: damaged (the names of {CLASSES} classes are not in it)")
    sets = {}
    for split, file in (("train", train), ("test", test)):
        pixels, labels = read(folder / file)
        if not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
            raise DataError(f"{folder / file}: damaged (labels must be from 0 to {CLASSES - 1})")
        images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        sets[split] = ArraySet(images, labels, [f"cifar100/{split}/{i:05d}" for i in range(len(labels))])
    return tuple(names), sets


def _read_binary(path: Path) -> Found:
    """Each image: the number of its superclass, that of its class, then its red, green and blue pixels."""
    content = np.frombuffer(_bytes(path), dtype=np.uint8)
    row = 2 + 3 * SIDE * SIDE
    if len(content) % row:
        raise DataError(f"{path}: damaged ({len(content):,} bytes are no multiple of {row:,})")
    rows = content.reshape(-1, row)
    return rows[:, 2:], rows[:, 1].astype(np.int64)


def _read_pickled(path: Path) -> Found:
    content = _mapping(path)
    pixels: Any = content.get("data")
    labels: Any = content.get("fine_labels")
    good = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(labels, list)
    if not good or pixels.shape != (len(labels), 3 * SIDE * SIDE):
        raise DataError(f"{path}: damaged (data and fine_labels of as many images of {SIDE}x{SIDE} are not in it)")
    try:
        return pixels, np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged (fine_labels are no whole numbers)") from error


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = _Unpickler(io.BytesIO(_bytes(path)), encoding="latin1").load()
    except Exception as error:  # damaged bytes make the parser raise nearly anything
        raise DataError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged (no mapping in it)")
    return content


class _Unpickler(pickle.Unpickler):
    """Loads arrays and builtin types; any other class or function is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # whatever this version of NumPy calls it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how newer pickles hold the bytes of an array
            return _encode
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is never loaded: it could run code")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
