"""Decoded pixels kept in memory: one uint8 tensor for a whole image set."""

from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from potstill.data.cores import threads
from potstill.data.images import FileSet, ImageSet, Subset
from potstill.data.memory import free_bytes
from potstill.data.preprocess import fit
from potstill.data.unlabeled import Joined

_Key = tuple[int, str, torch.device]
_kept: "WeakKeyDictionary[ImageSet, dict[_Key, Tensor]]" = WeakKeyDictionary()


def pack(images: ImageSet, side: int, how: str, *, device: torch.device, memory_share: float) -> Tensor | None:
    """All images as squares, decoded once for as long as the image set lives.

    Args:
        images: N of them.
        side: R, of the square in pixels.
        how: "crop" or "squash", as ``preprocess.fit``.
        device: where the tensor is wanted; it stays on the CPU where the device has no room.
        memory_share: of free memory that it may take.

    Returns:
        uint8 [N, 3, R, R], or None where it does not fit.

    Raises:
        DataError: an image cannot be decoded.
    """
    size = len(images) * 3 * side * side
    places = [device, torch.device("cpu")] if device.type != "cpu" else [device]
    known = _memory_of(images)
    for place in places:
        if (side, how, place) in known:
            return known[side, how, place]
    roomy = [place for place in places if size <= memory_share * free_bytes(place)]
    if not roomy:
        return None
    packed = known[side, how, roomy[0]] = _decode_all(images, side, how).to(roomy[0])
    return packed


def squares(images: ImageSet, index: list[int], side: int, how: str) -> Tensor:
    """These images as squares, uint8 [B, 3, side, side]."""
    return torch.stack([torch.from_numpy(fit(images.pixels(i), side, how)) for i in index])


def _decode_all(images: ImageSet, side: int, how: str) -> Tensor:
    packed = torch.empty((len(images), 3, side, side), dtype=torch.uint8)
    target = packed.numpy()

    def put(i: int) -> None:
        target[i] = fit(images.pixels(i), side, how)

    if _from_files(images):  # Pillow lets other threads run while it decodes
        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(put, range(len(images))))
    else:
        for i in range(len(images)):
            put(i)
    return packed


def _memory_of(images: ImageSet) -> dict[_Key, Tensor]:
    try:
        return _kept.setdefault(images, {})
    except TypeError:  # somebody's own image set that cannot be hashed or weakly referred to: decoded each time
        return {}


def _from_files(images: ImageSet) -> bool:
    parts = [images.images] if isinstance(images, Subset) else images.parts if isinstance(images, Joined) else []
    return isinstance(images, FileSet) or (len(parts) > 0 and all(map(_from_files, parts)))
