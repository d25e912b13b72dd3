"""Image sets: names, labels and pixels of one split, and combinations of sets.

An image set consists of files, members of tar shards, arrays, or items of a torch data set; a subset, a set with other
labels and a set with unlabeled images wrap other sets.
"""

import hashlib
import io
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.data.image_io import (
    JPEG_START,
    MAX_BYTES,
    DecodedImage,
    Pixels,
    ValueRange,
    ValueSpan,
    read_file,
    read_image,
    silence_pillow,
    to_rgb,
    wide_span,
)
from potstill.data.image_structure import parse_structure
from potstill.data.preprocessing import resize_to_square, stretch_with_shape
from potstill.data.shard_reader import ShardSample, read_byte_range
from potstill.errors import DataError

if TYPE_CHECKING:
    from potstill.data.decoded_cache import StagedSquares


class ContentSet(ABC):
    """Images in files, or in parts of files, that are decoded on access."""

    names: tuple[str, ...]
    digests: NDArray[np.uint8] | None = None  # [N, 32], of the content that was checked
    range: ValueRange | None = None  # of images of more than 8 bits; None: each image's own

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> Pixels:
        """Return image i, uint8 [H, W, 3]."""
        return self.read(i).pixels

    def read(self, i: int, side: int | None = None) -> DecodedImage:
        """Return image i, decoded for a square of ``side`` pixels as in ``image_io.decode``."""
        return read_image(self.content(i), self.place(i), self.range, side)

    def content(self, i: int) -> bytes:
        """Return image i's file, if it has not changed since it was checked."""
        content = self.read_bytes(i)
        if self.digests is not None and hashlib.sha256(content).digest() != self.digests[i].tobytes():
            raise DataError(f"{self.place(i)}: the file has changed since it was checked; start again")
        return content

    @abstractmethod
    def read_bytes(self, i: int) -> bytes:
        """Return image i's file."""

    @abstractmethod
    def place(self, i: int) -> str:
        """Return where image i is, for messages."""

    @abstractmethod
    def size(self, i: int) -> int:
        """Return the bytes of image i's file; more than any file may have if it is gone."""


class ShardSet(ContentSet):
    """Images in tar shards, ``samples`` [N] of (shard URL, sample), each read by its byte range on access."""

    digests: NDArray[np.uint8]

    def __init__(self, samples: Sequence[tuple[str, ShardSample]], labels: Sequence[int]) -> None:
        self.locations = [(url, each.offset, each.size) for url, each in samples]
        self.names = tuple(sample_name(url, each) for url, each in samples)
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        digests = b"".join(bytes.fromhex(each.digest) for _, each in samples)
        self.digests = np.frombuffer(digests, np.uint8).reshape(len(samples), 32)
        self.contents = {
            name: f"{each.size} {each.digest} {each.span}".rstrip()
            for name, (_, each) in zip(self.names, samples, strict=True)
        }

    def place(self, i: int) -> str:
        return self.names[i]

    def size(self, i: int) -> int:
        return self.locations[i][2]

    def read_bytes(self, i: int) -> bytes:
        return read_byte_range(*self.locations[i])


def sample_name(url: str, sample: ShardSample) -> str:
    """Return the name of a sample in messages: the shard's file name and the sample's name within it."""
    return f"{url.rpartition('/')[2]}/{sample.name.removeprefix('./')}"


Labels = NDArray[np.int64]


class ImageSet(Protocol):
    """One split: N images with names and labels."""

    @property
    def names(self) -> Sequence[str]:
        """[N]: the path relative to the data folder, or a generated name such as "digits/00017"."""

    @property
    def labels(self) -> Labels:
        """[N] int64 class ids."""

    def __len__(self) -> int: ...

    def pixels(self, i: int) -> Pixels:
        """Return image i, uint8 RGB [H, W, 3] of any size."""


class ArraySet:
    """Images in memory: uint8 [N, H, W] (gray) or [N, H, W, 3] (RGB), with class ids and names."""

    def __init__(self, images: Pixels, labels: Sequence[int] | NDArray[Any], names: Sequence[str]) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(f"images must be uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        self.images, self.names = images, tuple(names)
        self.labels = _validate_labels(labels, len(images), len(self.names))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, i: int) -> Pixels:
        """Return image i, uint8 [H, W, 3]."""
        image: Pixels = self.images[i]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


class FileSet(ContentSet):
    """Image files below a folder, by [N] names relative to it with forward slashes, decoded on access."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | NDArray[Any]) -> None:
        self.root, self.names = root, tuple(names)
        self.labels = _validate_labels(labels, len(self.names), len(self.names))
        self.staged: StagedSquares | None = None  # squares that were decoded when the files were checked

    def expect(self, contents: Mapping[str, str], staged: "StagedSquares | None" = None) -> None:
        """From now on, refuse files with other contents than these, and use the squares that were staged."""
        self.staged = staged
        digests = "".join(contents[name].split()[1] for name in self.names)
        self.digests = np.frombuffer(bytes.fromhex(digests), np.uint8).reshape(len(self.names), 32)

    def place(self, i: int) -> str:
        return str(self.root / self.names[i])

    def size(self, i: int) -> int:
        try:
            return (self.root / self.names[i]).stat().st_size
        except OSError:
            return MAX_BYTES + 1

    def read_bytes(self, i: int) -> bytes:
        return read_file(self.root / self.names[i])


class TorchSet:
    """Any map-style torch data set whose items are (image, label, ...), without random transforms.

    Args:
        dataset: image: PIL image, or tensor [C, H, W] or array [H, W] or [H, W, C] with C of 1, 3 or 4; uint8, or
            floats in [0, 1].
        labels: [N] class ids; None: those of ``read_labels``.
        names: [N]; None: ``prefix/00000`` and so on.
        prefix: of generated names.

    Raises:
        DataError: an item is no image, or labels are no class ids.
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
        self.labels = _validate_labels(
            read_labels(dataset, self.names) if labels is None else labels, count, len(self.names)
        )
        self.range: ValueRange | None = None  # of PIL images of more than 8 bits; None: each image's own
        self.spans: dict[int, ValueSpan] = {}  # of those that were read

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> Pixels:
        """Return image i, uint8 [H, W, 3]."""
        image = read_item(self.dataset, i, self.names[i])[0]
        try:
            pixels = _to_pixels(image, self.range)
            if isinstance(image, Image.Image) and (span := wide_span(image)) is not None:
                self.spans[i] = span
            return pixels
        except DataError as error:
            raise DataError(f"{self.names[i]}: {error}") from None


class Subset:
    """Images ``index`` of another set; ``identity`` identifies that set, all of whose images are then decoded at once,
    for all selections from it (see ``decoding_set``); None: the selection is decoded by itself.
    """

    def __init__(self, images: ImageSet, index: Sequence[int] | NDArray[Any], *, identity: str | None = None) -> None:
        self.images, self.index, self.identity = images, np.asarray(index, dtype=np.int64), identity
        self.names = tuple(images.names[i] for i in self.index)
        self.labels: Labels = images.labels[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def pixels(self, i: int) -> Pixels:
        """Return image i of the subset, uint8 [H, W, 3]."""
        return self.images.pixels(int(self.index[i]))


def _validate_labels(labels: Sequence[int] | Sequence[str] | NDArray[Any], images: int, names: int) -> Labels:
    found = np.asarray(labels)
    if found.ndim != 1 or not len(found) == images == names:
        raise DataError(f"{images} images need as many labels and names, got {list(found.shape)} and {names}")
    if (found.dtype.kind not in "iu" and images) or (images and found.min() < 0):
        raise DataError(f"labels must be whole numbers from 0, got {found[:5].tolist()}")
    return found.astype(np.int64)


def read_item(dataset: Any, i: int, name: str) -> tuple[Any, Any]:
    """Return (image, label) of a torch data set."""
    try:
        item = dataset[i]
    except Exception as error:  # the user's data set may raise anything
        raise DataError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"{name}: an item must be a pair (image, label), got an object of type {type(item).__name__}")
    return item[0], item[1]


def read_labels(dataset: Any, names: Sequence[str]) -> list[int] | list[str]:
    """Return the labels of a torch data set: its ``targets``, or else those of its items, read one by one."""
    targets: Any = getattr(dataset, "targets", None)
    # A target_transform would change what `targets` holds.
    if targets is None or len(targets) != len(names) or getattr(dataset, "target_transform", None) is not None:
        targets = [read_item(dataset, i, name)[1] for i, name in enumerate(names)]
    labels: list[Any] = []
    for name, label in zip(names, targets, strict=True):
        try:
            labels.append(label if isinstance(label, str) else operator.index(label))
        except (TypeError, ValueError, RuntimeError):  # torch's, of a tensor of several numbers
            shown = " ".join(repr(label).split())[:60]
            raise DataError(f"{name}: a label must be a whole number or a class name, got {shown}") from None
    if {*map(type, labels)} == {int, str}:
        raise DataError(f"{names[0]}: labels must be all whole numbers or all class names, got both")
    return labels


def _to_pixels(image: Any, ends: ValueRange | None) -> Pixels:
    if isinstance(image, Image.Image):
        try:
            image.load()
        except Exception as error:  # Pillow raises nearly anything
            raise DataError(f"cannot be decoded: {' '.join(str(error).split())[:160]}") from error
        return np.ascontiguousarray(to_rgb(image, ends))
    kind = type(image).__name__
    if hasattr(image, "detach"):  # a tensor: recognised without importing torch
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    array = np.asarray(image)
    if array.dtype.kind not in "biufc":
        raise DataError(f"an image must be a PIL image, an array or a tensor, got an object of type {kind}")
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


class RelabeledSet:
    """Another set's images and names, with these class ids; -100: unknown, or not to be used."""

    def __init__(self, images: ImageSet, labels: Labels) -> None:
        self.images, self.names = images, images.names
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, i: int) -> Pixels:
        """Return image i, uint8 [H, W, 3]."""
        return self.images.pixels(i)


UNLABELED = -100  # as ``potstill.types.UNLABELED``, whose module imports torch


class SquareSet(RelabeledSet, ABC):
    """Another set's images, whose squares are made by ``square`` in place of decoding each image."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__(images, images.labels)

    @abstractmethod
    def square(self, i: int) -> Pixels:
        """Return image i as a square of the side and mode that the set is for, as ``read_square`` does."""


class UnlabeledFileSet(FileSet):
    """Image files below a folder, without labels."""

    def __init__(self, root: Path, names: list[str]) -> None:
        super().__init__(root, names, np.zeros(len(names), dtype=np.int64))
        self.labels = np.full(len(names), UNLABELED, dtype=np.int64)


class ConcatenatedSet:
    """Several sets, one after the other."""

    def __init__(self, *parts: ImageSet) -> None:
        self.parts = parts
        self.names = tuple(name for part in parts for name in part.names)
        self.labels: Labels = np.concatenate([part.labels for part in parts])

    def __len__(self) -> int:
        return len(self.names)

    def locate(self, i: int) -> tuple[ImageSet, int]:
        """Return the part that holds image i, and its position there."""
        for part in self.parts[:-1]:
            if i < len(part):
                return part, i
            i -= len(part)
        return self.parts[-1], i

    def pixels(self, i: int) -> Pixels:
        """Return image i, uint8 [H, W, 3]."""
        part, i = self.locate(i)
        return part.pixels(i)


class SemiSupervisedSet(ConcatenatedSet):
    """Labeled images followed by unlabeled ones; labels of the latter are ignored."""

    def __init__(self, labeled: ImageSet, unlabeled: ImageSet) -> None:
        super().__init__(labeled, unlabeled)
        self.labeled, self.unlabeled = labeled, unlabeled
        self.labels = np.concatenate([labeled.labels, np.full(len(unlabeled), UNLABELED, dtype=np.int64)])


def decoding_set(images: ImageSet, identity: str | None) -> tuple[ImageSet, Labels | None, str | None]:
    """Return the set to decode for these images, their positions in it (None: it is the same), and its identity.

    The splits of all folds of a cross-validation select from one set, which is decoded once.
    """
    if isinstance(images, Subset) and images.identity is not None:
        return images.images, images.index, images.identity
    if isinstance(images, SemiSupervisedSet):
        whole, index, found = decoding_set(images.labeled, identity)
        if index is not None:
            unlabeled = len(whole) + np.arange(len(images.unlabeled))
            return SemiSupervisedSet(whole, images.unlabeled), np.concatenate([index, unlabeled]), found
    return images, None, identity


def file_paths(images: ImageSet) -> list[Path]:
    """Return the paths of a set's files; empty if it does not consist of files."""
    if isinstance(images, RelabeledSet):
        return file_paths(images.images)
    if isinstance(images, Subset):
        inner = file_paths(images.images)
        return [inner[i] for i in images.index] if inner else []
    if isinstance(images, ConcatenatedSet):
        parts = [file_paths(part) for part in images.parts]
        return [path for part in parts for path in part] if all(parts) else []
    return [images.root / name for name in images.names] if isinstance(images, FileSet) else []


_MAX_SIZES = 256  # images whose size is read before a run


def is_file_based(images: ImageSet) -> bool:
    """Return whether all images are files, which can be decoded in several threads."""
    return all(isinstance(part, ContentSet) for part in _leaf_sets(images))


def is_array_based(images: ImageSet) -> bool:
    """Return whether all images are arrays in memory."""
    return all(isinstance(part, ArraySet) for part in _leaf_sets(images))


def file_digests(images: ImageSet) -> NDArray[np.uint8] | None:
    """Return the SHA-256 of each file, uint8 [N, 32]; None unless all images are files that were checked."""
    if isinstance(images, RelabeledSet):
        return file_digests(images.images)
    if isinstance(images, Subset):
        inner = file_digests(images.images)
        return None if inner is None else inner[images.index]
    if isinstance(images, ConcatenatedSet):
        digests = [each for part in images.parts if (each := file_digests(part)) is not None]
        return np.concatenate(digests) if len(digests) == len(images.parts) else None
    return images.digests if isinstance(images, ContentSet) else None


def short_digests(images: ImageSet) -> list[str]:
    """Return the first 16 hexadecimal digits of each file's SHA-256; "" for images that are no files."""
    digests = file_digests(images)
    return [""] * len(images) if digests is None else [each.tobytes().hex() for each in digests[:, :8]]


def value_ranges(images: ImageSet) -> list[ValueRange | None]:
    """Return the distinct value ranges of a set's files and PIL images."""
    ranges = [part.range for part in _leaf_sets(images) if isinstance(part, (ContentSet, TorchSet))]
    return list(dict.fromkeys(ranges))


def set_value_range(images: ImageSet, ends: ValueRange) -> None:
    """From now on, map images of more than 8 bits from this range: that of the model whose input they are."""
    for part in _leaf_sets(images):
        if isinstance(part, (ContentSet, TorchSet)):
            part.range = ends


def image_sizes(images: ImageSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return widths and heights of up to ``_MAX_SIZES`` images from their headers; empty if they have none."""
    found = [size for i in np.unique(np.linspace(0, len(images) - 1, _MAX_SIZES).astype(int)).tolist()
             if (size := _image_size(images, i)) is not None] if len(images) else []  # fmt: skip
    sizes = np.array(found, dtype=np.int64).reshape(-1, 2)
    return sizes[:, 0], sizes[:, 1]


def read_square(images: ImageSet, i: int, side: int, resize_mode: str) -> Pixels:
    """Return image i as a square, uint8 of ``preprocessing.square_shape``; large JPEG files are decoded at a reduced
    scale.

    ``resize_mode``: "crop", "pad", "stretch" (``resize_to_square``) or "whole" (``stretch_with_shape``, with the shape
    of the image in its file).
    """
    if isinstance(images, SquareSet):
        return images.square(i)
    images, i = _leaf_of(images, i)
    if isinstance(images, FileSet) and images.staged is not None and images.digests is not None:
        found = images.staged.take(images.digests[i].tobytes(), side, resize_mode)
        if found is not None:
            return found
    if isinstance(images, ContentSet):
        return to_square(images.read(i, side), side, resize_mode)
    pixels = images.pixels(i)
    if resize_mode == "whole":
        return stretch_with_shape(pixels, side, pixels.shape[:2])
    return resize_to_square(pixels, side, resize_mode)


def small_jpeg_file(images: ImageSet, i: int, most: int, side: int) -> bytes | None:
    """Return image i's file if it is a JPEG file of at most ``most`` bytes and ``side`` x ``side`` pixels; else None.

    Raises:
        DataError: the file has changed.
    """
    images, i = _leaf_of(images, i)
    if not isinstance(images, ContentSet) or images.size(i) > most:
        return None
    content = images.content(i)
    if not content.startswith(JPEG_START):
        return None
    with silence_pillow(), Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return content if image.width * image.height <= side * side else None


def read_pixels(images: ImageSet, i: int, side: int) -> Pixels:
    """Return image i, uint8 [H, W, 3]; large JPEG files are decoded at a reduced scale, as ``read_square`` does."""
    images, i = _leaf_of(images, i)
    return images.read(i, side).pixels if isinstance(images, ContentSet) else images.pixels(i)


def to_square(decoded: DecodedImage, side: int, resize_mode: str) -> Pixels:
    """Return a decoded image as a square, as ``read_square`` does."""
    if resize_mode == "whole":
        return stretch_with_shape(decoded.image, side, decoded.shape)
    return resize_to_square(decoded.image, side, resize_mode)


def _leaf_of(images: ImageSet, i: int) -> tuple[ImageSet, int]:
    """Return the set within wrappers that holds image i, and its position there."""
    while isinstance(images, (Subset, RelabeledSet, ConcatenatedSet)):
        if isinstance(images, ConcatenatedSet):
            images, i = images.locate(i)
        else:
            i = int(images.index[i]) if isinstance(images, Subset) else i
            images = images.images
    return images, i


def _image_size(images: ImageSet, i: int) -> tuple[int, int] | None:
    images, i = _leaf_of(images, i)
    if isinstance(images, ArraySet):
        return images.images.shape[2], images.images.shape[1]
    if not isinstance(images, FileSet):
        return None
    try:
        structure = parse_structure(read_file(images.root / images.names[i]))
        with silence_pillow(), Image.open(io.BytesIO(structure.content), formats=(structure.format,)) as image:
            return image.size
    except Exception:  # Pillow raises nearly anything; the run reports the file
        return None


def _leaf_sets(images: ImageSet) -> Sequence[ImageSet]:
    if isinstance(images, (Subset, RelabeledSet)):
        return _leaf_sets(images.images)
    if isinstance(images, ConcatenatedSet):
        return [inner for part in images.parts for inner in _leaf_sets(part)]
    return [images]
