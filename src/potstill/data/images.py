"""Image sets: names, labels and pixels of one split."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.data.decode import Pixels, decode_bytes, read_file, to_rgb
from potstill.data.value_range import Range
from potstill.errors import DataError

Labels = NDArray[np.int64]


class ImageSet(Protocol):
    """One split: N images with names and labels."""

    @property
    def names(self) -> Sequence[str]:
        """[N]: the path relative to the data folder, or a made name such as "digits/00017"."""

    @property
    def labels(self) -> Labels:
        """[N] int64 class ids."""

    def __len__(self) -> int: ...

    def pixels(self, i: int) -> Pixels:
        """Image i: uint8 RGB [H, W, 3] of any size.

        Raises:
            DataError: it cannot be decoded.
        """


class ArraySet:
    """Images that are arrays in memory.

    Args:
        images: uint8 [N, H, W] (gray) or [N, H, W, 3] (RGB).
        labels: [N] class ids.
        names: [N].
    """

    def __init__(self, images: Pixels, labels: Sequence[int] | NDArray[Any], names: Sequence[str]) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(f"images must be uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        self.images, self.names = images, tuple(names)
        self.labels = _checked_labels(labels, len(images), len(self.names))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3]."""
        image: Pixels = self.images[i]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


class FileSet:
    """Image files below a folder, decoded when asked for.

    Args:
        root: the folder.
        names: [N] paths relative to ``root``, with forward slashes.
        labels: [N] class ids.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | NDArray[Any]) -> None:
        self.root, self.names = root, tuple(names)
        self.labels = _checked_labels(labels, len(self.names), len(self.names))
        self.digests: NDArray[np.uint8] | None = None
        self.range: Range | None = None  # of images of more than 8 bits; None: each image's own

    def __len__(self) -> int:
        return len(self.names)

    def expect(self, contents: Mapping[str, str]) -> None:
        """From now on, a file with another content than was found in it is refused.

        Args:
            contents: name -> size and SHA-256, as ``check.check_files`` gives them.
        """
        found = "".join(contents[name].split()[1] for name in self.names)
        self.digests = np.frombuffer(bytes.fromhex(found), np.uint8).reshape(len(self.names), 32)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3].

        Raises:
            DataError: the file cannot be decoded, or is not the one that was expected.
        """
        path = self.root / self.names[i]
        content = read_file(path)
        if self.digests is not None and hashlib.sha256(content).digest() != self.digests[i].tobytes():
            raise DataError(f"{path}: the file has changed since it was checked; start again")
        return decode_bytes(content, str(path), self.range)


class TorchSet:
    """Any map-style torch data set whose items are (image, label, ...), without random transforms.

    Args:
        dataset: image: PIL image, or tensor [C, H, W] or array [H, W] or [H, W, C] with C of 1, 3 or 4; uint8, or
            floats in [0, 1].
        labels: [N] class ids; None: the data set's ``targets``, or read from its items one by one.
        names: [N]; None: ``prefix/00000`` and so on.
        prefix: of made names.

    Raises:
        DataError: no image, or labels that are no class ids.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        labels: Sequence[int] | NDArray[Any] | None = None,
        names: Sequence[str] | None = None,
        prefix: str = "image",
    ) -> None:
        self.dataset = dataset
        count = len(dataset)
        self.names = tuple(names) if names is not None else tuple(f"{prefix}/{i:05d}" for i in range(count))
        self.labels = _checked_labels(_labels_of(dataset) if labels is None else labels, count, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3].

        Raises:
            DataError: an item that is no image, or floats outside [0, 1].
        """
        try:
            item = self.dataset[i]
        except Exception as error:  # the data set is the user's: whatever it raises, the item cannot be read
            raise DataError(f"{self.names[i]}: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
        try:
            return _to_pixels(item[0])
        except DataError as error:
            raise DataError(f"{self.names[i]}: {error}") from None


class Subset:
    """Some images of another set, in the given order."""

    def __init__(self, images: ImageSet, index: Sequence[int] | NDArray[Any]) -> None:
        self.images, self.index = images, np.asarray(index, dtype=np.int64)
        self.names = tuple(images.names[i] for i in self.index)
        self.labels: Labels = images.labels[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def pixels(self, i: int) -> Pixels:
        """Image i of the subset, uint8 [H, W, 3]."""
        return self.images.pixels(int(self.index[i]))


def _checked_labels(labels: Sequence[int] | NDArray[Any], images: int, names: int) -> Labels:
    found = np.asarray(labels)
    if found.ndim != 1 or not len(found) == images == names:
        raise DataError(f"{images} images need as many labels and names, got {list(found.shape)} and {names}")
    if (found.dtype.kind not in "iu" and images) or (images and found.min() < 0):
        raise DataError(f"labels must be whole numbers from 0, got {found[:5].tolist()}")
    return found.astype(np.int64)


def _labels_of(dataset: Any) -> NDArray[Any]:
    # A target_transform would change what `targets` holds.
    known = getattr(dataset, "targets", None)
    if known is not None and len(known) == len(dataset) and getattr(dataset, "target_transform", None) is None:
        return np.asarray(known)
    return np.asarray([int(dataset[i][1]) for i in range(len(dataset))], dtype=np.int64)


def _to_pixels(image: Any) -> Pixels:
    if isinstance(image, Image.Image):
        image.load()
        return np.ascontiguousarray(to_rgb(image))
    if hasattr(image, "detach"):  # a tensor: recognised without importing torch
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise DataError(f"an image has 1, 3 or 4 channels; got shape {list(array.shape)}")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError("floats must be in [0, 1]: give the data set without a normalising transform")
        array = (array * 255 + 0.5).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f"pixels must be uint8 or floats in [0, 1], got {array.dtype}")
    if array.shape[2] == 4:
        return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
