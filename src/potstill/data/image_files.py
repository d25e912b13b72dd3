"""What image sets consist of: files, arrays, or something that only its owner knows."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.data.decode import read_file
from potstill.data.image_structure import examine
from potstill.data.images import ArraySet, FileSet, ImageSet, Subset
from potstill.data.quiet import quiet_pillow
from potstill.data.relabelled import Relabelled
from potstill.data.shards.source import ShardSet
from potstill.data.unlabeled import Joined
from potstill.data.value_range import Range

_SAMPLED = 256  # images whose size is looked at before a run


def from_files(images: ImageSet) -> bool:
    """Whether all images are files, which may be decoded in several threads."""
    return all(isinstance(part, (FileSet, ShardSet)) for part in _parts(images))


def are_arrays(images: ImageSet) -> bool:
    """Whether all images lie in memory already."""
    return all(isinstance(part, ArraySet) for part in _parts(images))


def digests_of(images: ImageSet) -> NDArray[np.uint8] | None:
    """uint8 [N, 32]: SHA-256 of each file's content, where all images are files that were checked; else None."""
    if isinstance(images, Relabelled):
        return digests_of(images.images)
    if isinstance(images, Subset):
        inner = digests_of(images.images)
        return None if inner is None else inner[images.index]
    if isinstance(images, Joined):
        found = [digests_of(part) for part in images.parts]
        whole = [each for each in found if each is not None]
        return np.concatenate(whole) if len(whole) == len(found) else None
    return images.digests if isinstance(images, (FileSet, ShardSet)) else None


def ranges_of(images: ImageSet) -> list[Range | None]:
    """By which its files are read, one for each part; without what the parts have in common."""
    found = [part.range for part in _parts(images) if isinstance(part, (FileSet, ShardSet))]
    return list(dict.fromkeys(found))


def read_by(images: ImageSet, ends: Range) -> None:
    """From now on, files of more than 8 bits are read by this range: that of the model which is to see them."""
    for part in _parts(images):
        if isinstance(part, (FileSet, ShardSet)):
            part.range = ends


def sizes_of(images: ImageSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Widths and heights of at most ``_SAMPLED`` images, evenly from all, by the headers of their files; empty where
    the images are neither files nor arrays.
    """
    found = [size for i in np.unique(np.linspace(0, len(images) - 1, _SAMPLED).astype(int)).tolist()
             if (size := _size(images, i)) is not None] if len(images) else []  # fmt: skip
    sizes = np.array(found, dtype=np.int64).reshape(-1, 2)
    return sizes[:, 0], sizes[:, 1]


def _size(images: ImageSet, i: int) -> tuple[int, int] | None:
    while isinstance(images, (Subset, Relabelled)):
        i = int(images.index[i]) if isinstance(images, Subset) else i
        images = images.images
    if isinstance(images, ArraySet):
        return images.images.shape[2], images.images.shape[1]
    if not isinstance(images, FileSet):
        return None
    try:
        structure = examine(read_file(images.root / images.names[i]))
        with quiet_pillow(), Image.open(io.BytesIO(structure.content), formats=(structure.format,)) as image:
            return image.size
    except Exception:  # Pillow raises nearly anything; the run says what is wrong with the file
        return None


def _parts(images: ImageSet) -> Sequence[ImageSet]:
    """Without the sets that only arrange others."""
    if isinstance(images, (Subset, Relabelled)):
        return _parts(images.images)
    if isinstance(images, Joined):
        return [inner for part in images.parts for inner in _parts(part)]
    return [images]
