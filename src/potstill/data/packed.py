"""Decoded pixels: one uint8 tensor for a whole image set, mapped from a file or in memory."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from potstill.data.cores import in_turn
from potstill.data.image_files import are_arrays, from_files
from potstill.data.images import ImageSet
from potstill.data.memory import free_bytes
from potstill.data.pixel_cache import Wanted, kept_pixels
from potstill.data.preprocess import fit
from potstill.data.watcher import Watcher

_PIECE = 64  # images that a thread decodes at a time

_Key = tuple[int, str, torch.device]
_kept: "WeakKeyDictionary[ImageSet, dict[_Key, Tensor]]" = WeakKeyDictionary()


def pack(
    images: ImageSet,
    side: int,
    how: str,
    *,
    device: torch.device,
    memory_share: float,
    processes: int = 1,
    identity: str | None = None,
    progress: Watcher | None = None,
) -> Tensor | None:
    """All images as squares, decoded once for as long as the image set lives, or, where they are kept on disk, for as
    long as the images stay the same.

    Args:
        images: N of them.
        side: R, of the square in pixels.
        how: "crop", "pad" or "stretch", as ``preprocess.fit``.
        device: where the tensor is wanted; it stays on the CPU where the device has no room.
        memory_share: of free memory, and of the free disk, that it may take.
        processes: of this machine that call this: each has its share of the memory, and all map one file.
        identity: a word for the images and their content; None: they are not kept on disk.
        progress: is told about what takes long.

    Returns:
        uint8 [N, 3, R, R], not to be written to; None where it does not fit anywhere.

    Raises:
        DataError: an image cannot be decoded.
    """
    size = len(images) * 3 * side * side
    cpu = torch.device("cpu")
    places = [device, cpu] if device.type != "cpu" else [device]
    known = _memory_of(images)
    for place in places:
        if (side, how, place) in known:
            return known[side, how, place]
    roomy = [place for place in places if size <= memory_share / processes * free_bytes(place)]
    packed = None
    # Arrays lie in memory already, and are quickly made to squares.
    if identity is not None and not (roomy and are_arrays(images)):
        packed = kept_pixels(Wanted(images, side, how, identity), share=memory_share, progress=progress)
    if packed is None:
        if not roomy:
            return None
        packed = _decode_all(images, side, how, progress)
    place = device if device in roomy else cpu
    packed = known[side, how, place] = packed.to(place)
    return packed


def squares(images: ImageSet, index: list[int], side: int, how: str) -> Tensor:
    """These images as squares, uint8 [B, 3, side, side]."""
    return torch.stack([torch.from_numpy(fit(images.pixels(i), side, how)) for i in index])


def _decode_all(images: ImageSet, side: int, how: str, progress: Watcher | None) -> Tensor:
    packed = torch.empty((len(images), 3, side, side), dtype=torch.uint8)
    target = packed.numpy()

    def put(start: int) -> int:
        end = min(start + _PIECE, len(images))
        for i in range(start, end):
            target[i] = fit(images.pixels(i), side, how)
        return end

    # Pillow lets other threads run while it decodes; somebody's own image set may know nothing of threads.
    for done in in_turn(put, range(0, len(images), _PIECE), at_once=None if from_files(images) else 1):
        if progress is not None:
            progress.wait("decoding images", done, len(images))
    return packed


def _memory_of(images: ImageSet) -> dict[_Key, Tensor]:
    try:
        return _kept.setdefault(images, {})
    except TypeError:  # somebody's own image set that cannot be hashed or weakly referred to: decoded each time
        return {}
