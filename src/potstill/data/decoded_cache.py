"""Decode an image set once: one uint8 tensor, in memory or mapped from a file of the cache.

Files are in the cache folder, ``pixels/<key>/``; the key covers everything that decides the pixels.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from potstill.data.concurrency import HAS_FILE_LOCKS, ProgressReporter, file_lock, threaded_map
from potstill.data.decoded_file import PixelFile, make_room
from potstill.data.image_io import decoder_version
from potstill.data.image_sets import ImageSet, file_digests, is_array_based, is_file_based, value_ranges
from potstill.data.preprocessing import resize_to_square
from potstill.errors import StorageError
from potstill.formatting import format_scaled
from potstill.io import cache_folder, write_text

_DEFAULT_BYTES = 4 * 2**30  # bytes, where the system does not say
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes free on the device; of the CPU's memory, what the container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0  # what an accelerator shares with the CPU cannot be asked for: keep the pixels on the CPU
    return min(_available(), _container_free())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS; half of it is a guess
    except (AttributeError, ValueError, OSError):
        return _DEFAULT_BYTES


def _container_free() -> int:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text()) - _reclaimable()
    except (OSError, ValueError):  # no such group, or "max"
        return 2**63
    return max(0, limit - used)


def _reclaimable() -> int:
    """Bytes that the container is charged for, but which the system takes back: mapped pixels too."""
    rows = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in rows if name in ("inactive_file", "active_file"))


FORMAT = 1
SMALLEST = 2**20  # bytes of pixels that are worth a file
MANIFEST, LOCK = "manifest.json", "lock"
_PROBED = 16  # images, of sets whose content only their owner vouches for
_SYNC_SECONDS = 2.0  # work that a kill may cost
_SYNC_BYTES = 2**26
_LARGE = 2**30  # bytes that take longer than a moment to check
_STALLED = 600.0  # seconds in which another process has filled nothing
_FULL = (errno.ENOSPC, errno.EDQUOT)

_reported: "WeakKeyDictionary[ProgressReporter, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class DecodeRequest:
    """Squares of N images.

    Args:
        images: N of them.
        side: R.
        how: "crop", "pad" or "stretch", as ``preprocess.fit``.
        identity: a word for the images and their content.
    """

    images: ImageSet
    side: int
    how: str
    identity: str

    @property
    def nbytes(self) -> int:
        """Of all squares."""
        return len(self.images) * 3 * self.side**2

    def manifest(self) -> str:
        """All that decides the pixels, as JSON; its SHA-256 is the key."""
        names = "\n".join(self.images.names).encode("utf-8", "surrogateescape")
        found = {
            "format": FORMAT,
            "identity": self.identity,
            "content": self._content(),
            "names": hashlib.sha256(names).hexdigest(),
            "images": len(self.images),
            "side": self.side,
            "resize_mode": self.how,
            "decoder": decoder_version(),
            "ranges": value_ranges(self.images),
        }
        return json.dumps(found, indent=2, sort_keys=True) + "\n"

    def _content(self) -> str:
        digests = file_digests(self.images)
        if digests is not None:
            return hashlib.sha256(digests.tobytes()).hexdigest()
        probed = np.unique(np.linspace(0, len(self.images) - 1, _PROBED).astype(int)).tolist()
        pixels = (self.images.pixels(i) for i in probed)
        return hashlib.sha256(b"".join(f"{each.shape}".encode() + each.tobytes() for each in pixels)).hexdigest()


def cached_pixels(wanted: DecodeRequest, *, share: float, progress: ProgressReporter | None) -> Tensor | None:
    """The squares, from a file that is filled where it is not there yet.

    Args:
        wanted: which.
        share: of the free disk that they may take.
        progress: is told how large they are, how far it is, and once if it cannot be done.

    Returns:
        uint8 [N, 3, R, R], mapped from the file and not to be written to; None where they cannot be kept.

    Raises:
        DataError: an image cannot be decoded.
    """
    if not HAS_FILE_LOCKS or wanted.nbytes < SMALLEST:
        return None
    text = wanted.manifest()
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = cache_folder("pixels", key)
    file = PixelFile(folder, len(wanted.images), wanted.side, key)
    try:
        if not (
            _read(folder / MANIFEST) == text and file.intact(_check_progress(file, progress)).all()
        ) and not _fill_file(file, folder, text, wanted, share, progress):
            return None
        with contextlib.suppress(OSError):  # the last use; a cache may be read-only
            os.utime(folder / MANIFEST)
        return file.tensor()
    except (OSError, StorageError) as error:
        reason = f"{folder}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        _report_once(progress, "warn", f"decoded pixels are not kept on disk: {reason}")
        return None


def _fill_file(
    file: PixelFile, folder: Path, text: str, wanted: DecodeRequest, share: float, progress: ProgressReporter | None
) -> bool:
    """Have the whole file on disk, by this process or another; False: there is no room."""
    patience = _StallDetector(file, progress)
    with file_lock(folder / LOCK, patience.look) as waited:
        if waited:
            patience.over()
        missing = np.flatnonzero(~file.intact())
        if len(missing) and not make_room(folder, file.nbytes, share):
            size, where = format_scaled(file.nbytes, "B"), folder.parent
            _report_once(
                progress,
                "note",
                f"decoded pixels are not kept on disk: {size} is more than {100 * share:g} % of the room in {where}",
            )
            shutil.rmtree(folder, ignore_errors=True)
            return False
        try:
            if _read(folder / MANIFEST) != text:
                write_text(folder / MANIFEST, text)
            if len(missing):
                file.reserve()
                _decode_missing(file, missing.tolist(), wanted, progress)
        except (OSError, StorageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in _FULL:
                shutil.rmtree(folder, ignore_errors=True)  # others need the room
            raise
    return True


def _decode_missing(
    file: PixelFile, missing: list[int], wanted: DecodeRequest, progress: ProgressReporter | None
) -> None:
    images, side, total = wanted.images, wanted.side, len(wanted.images)
    done = total - sum(len(file.ids_of(block)) for block in missing)
    if progress is not None:
        there = f", of which {done:,} are there already" if done else ""
        progress.note(f"decoding {total:,} images once, into {file.pixels} ({format_scaled(file.nbytes, 'B')}){there}")
    with file.filling() as put:

        def fill(block: int) -> tuple[int, int]:
            ids = file.ids_of(block)
            squares = np.empty((len(ids), 3, side, side), np.uint8)
            for place, i in enumerate(ids):
                squares[place] = resize_to_square(images.pixels(i), side, wanted.how)
            return block, put(block, squares)

        filled: dict[int, int] = {}
        synced = time.monotonic()
        # Pillow lets other threads run while it decodes; somebody's own image set may know nothing of threads.
        for block, mark in threaded_map(fill, missing, at_once=None if is_file_based(images) else 1):
            filled[block] = mark
            done += len(file.ids_of(block))
            if progress is not None:
                progress.wait("decoding images", done, total)
            if time.monotonic() - synced > _SYNC_SECONDS or len(filled) * file.block_bytes > _SYNC_BYTES:
                file.mark(filled)
                filled, synced = {}, time.monotonic()
        file.mark(filled)


class _StallDetector:
    """Waits for another process for as long as that gets on."""

    WHAT = "waiting for another process that decodes images"

    def __init__(self, file: PixelFile, progress: ProgressReporter | None) -> None:
        self.file, self.progress = file, progress
        self.marked, self.since = -1, time.monotonic()

    def over(self) -> None:
        if self.progress is not None:
            self.progress.wait(self.WHAT, self.file.blocks, self.file.blocks)

    def look(self) -> None:
        marked = int(np.count_nonzero(self.file.marked()))
        if marked != self.marked:
            self.marked, self.since = marked, time.monotonic()
            if self.progress is not None:
                self.progress.wait(self.WHAT, marked, self.file.blocks)
        elif time.monotonic() - self.since > _STALLED:
            raise StorageError(f"another process holds {self.file.pixels.parent} and has not got on for ten minutes")


def _check_progress(file: PixelFile, progress: ProgressReporter | None) -> Callable[[int], None]:
    """For a file that takes long to check: how far it is."""
    checked = 0

    def watch(blocks: int) -> None:
        nonlocal checked
        checked += blocks
        if progress is not None and file.nbytes > _LARGE:
            progress.wait("checking decoded pixels", checked, file.blocks)

    return watch


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _report_once(progress: ProgressReporter | None, how: str, message: str) -> None:
    if progress is None:
        return
    told = _reported.setdefault(progress, set())
    if how not in told:
        told.add(how)
        progress.warn(message) if how == "warn" else progress.note(message)


_PIECE = 64  # images that a thread decodes at a time

_DecodedKey = tuple[int, str, torch.device]
_decoded: "WeakKeyDictionary[ImageSet, dict[_DecodedKey, Tensor]]" = WeakKeyDictionary()


def decode_all(
    images: ImageSet,
    side: int,
    how: str,
    *,
    device: torch.device,
    cache_fraction: float,
    processes: int = 1,
    identity: str | None = None,
    progress: ProgressReporter | None = None,
) -> Tensor | None:
    """All images as squares, decoded once for as long as the image set lives, or, where they are kept on disk, for as
    long as the images stay the same.

    Args:
        images: N of them.
        side: R, of the square in pixels.
        how: "crop", "pad" or "stretch", as ``preprocess.fit``.
        device: where the tensor is wanted; it stays on the CPU where the device has no room.
        cache_fraction: of free memory, and of the free disk, that it may take.
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
    known = _decoded_of(images)
    for place in places:
        if (side, how, place) in known:
            return known[side, how, place]
    roomy = [place for place in places if size <= cache_fraction / processes * free_bytes(place)]
    packed = None
    # Arrays lie in memory already, and are quickly made to squares.
    if identity is not None and not (roomy and is_array_based(images)):
        packed = cached_pixels(DecodeRequest(images, side, how, identity), share=cache_fraction, progress=progress)
    if packed is None:
        if not roomy:
            return None
        packed = _decode_in_memory(images, side, how, progress)
    place = device if device in roomy else cpu
    packed = known[side, how, place] = packed.to(place)
    return packed


def decode_squares(images: ImageSet, index: list[int], side: int, how: str) -> Tensor:
    """These images as squares, uint8 [B, 3, side, side]."""
    return torch.stack([torch.from_numpy(resize_to_square(images.pixels(i), side, how)) for i in index])


def _decode_in_memory(images: ImageSet, side: int, how: str, progress: ProgressReporter | None) -> Tensor:
    packed = torch.empty((len(images), 3, side, side), dtype=torch.uint8)
    target = packed.numpy()

    def put(start: int) -> int:
        end = min(start + _PIECE, len(images))
        for i in range(start, end):
            target[i] = resize_to_square(images.pixels(i), side, how)
        return end

    # Pillow lets other threads run while it decodes; somebody's own image set may know nothing of threads.
    for done in threaded_map(put, range(0, len(images), _PIECE), at_once=None if is_file_based(images) else 1):
        if progress is not None:
            progress.wait("decoding images", done, len(images))
    return packed


def _decoded_of(images: ImageSet) -> dict[_DecodedKey, Tensor]:
    try:
        return _decoded.setdefault(images, {})
    except TypeError:  # somebody's own image set that cannot be hashed or weakly referred to: decoded each time
        return {}
