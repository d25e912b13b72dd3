"""What image sets consist of: files, arrays, or something that only its owner knows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.data.images import ArraySet, FileSet, ImageSet, Subset
from potstill.data.relabelled import Relabelled
from potstill.data.shards.source import ShardSet
from potstill.data.unlabeled import Joined
from potstill.data.value_range import Range


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


def _parts(images: ImageSet) -> Sequence[ImageSet]:
    """Without the sets that only arrange others."""
    if isinstance(images, (Subset, Relabelled)):
        return _parts(images.images)
    if isinstance(images, Joined):
        return [inner for part in images.parts for inner in _parts(part)]
    return [images]
