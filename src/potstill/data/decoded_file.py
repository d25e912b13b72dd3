"""A file of decoded pixels in blocks with a checksum each: a half-filled or damaged file is never taken for complete.

``pixels.bin``: uint8 [N, 3, R, R].  ``done.bin``: 8 bytes a block: 1 and a CRC-32 of its bytes, or zeros.  Blocks are
synced before they are marked, and compared with their marks before they are used.  A block's bytes depend only on the
key, so rewriting one changes nothing for processes that read it at the same time.

``make_room`` removes files that were not used for long if the disk has no space for a new one.
"""

import contextlib
import mmap
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.concurrency import threaded_map, try_file_lock

BLOCK = 2**20  # bytes, approximately
_BLOCKS_PER_CHECK = 16  # blocks that a thread checks at a time
_WRITTEN = 2**32  # a bit above the checksum
_UINT32_MAX = 0xFFFFFFFF

Pixels = NDArray[np.uint8]


class PixelFile:
    """The file of N images of R x R pixels.

    Args:
        folder: of the two files.
        images: N.
        side: R.
        key: hex digits; part of the checksums, so that another file's blocks do not match.

    Raises:
        OSError: from all methods.
    """

    def __init__(self, folder: Path, images: int, side: int, key: str) -> None:
        self.pixels, self.marks = folder / "pixels.bin", folder / "done.bin"
        self.shape = (images, 3, side, side)
        self._image = 3 * side * side
        self.rows = max(1, BLOCK // self._image)
        self.blocks = -(-images // self.rows)
        self._seed = int(key[:8], 16)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.shape[0] * self._image

    @property
    def block_bytes(self) -> int:
        """Bytes of a block; the last may be smaller."""
        return self.rows * self._image

    def ids_of(self, block: int) -> range:
        """Return the images of a block."""
        return range(block * self.rows, min(self.shape[0], (block + 1) * self.rows))

    def read_marks(self) -> NDArray[np.int64]:
        """Return the marks [blocks]: 0, or 2**32 + checksum."""
        try:
            content = self.marks.read_bytes()[: 8 * self.blocks]
        except FileNotFoundError:
            content = b""
        return np.frombuffer(content.ljust(8 * self.blocks, b"\0"), "<i8").astype(np.int64)

    def intact(self, on_progress: Callable[[int], None] = lambda blocks: None) -> NDArray[np.bool_]:
        """Return which blocks match their marks, [blocks].  Reads the whole file.

        Args:
            on_progress: called with the number of blocks read since the last call.
        """
        marks = self.read_marks()
        is_intact = np.zeros(self.blocks, np.bool_)
        marked = np.flatnonzero(marks)
        if not len(marked):
            return is_intact
        pieces = [marked[start : start + _BLOCKS_PER_CHECK] for start in range(0, len(marked), _BLOCKS_PER_CHECK)]
        with _open(self.pixels, os.O_RDONLY) as handle:

            def check(piece: NDArray[np.int64]) -> list[bool]:
                buffer = bytearray(self.block_bytes)
                return [self._read_check(handle, int(block), buffer) == marks[block] for block in piece]

            for piece, same in zip(pieces, threaded_map(check, pieces), strict=True):
                is_intact[piece] = same
                on_progress(len(piece))
        return is_intact

    def reserve(self) -> None:
        """Allocate the disk space, so that a full disk is an error now."""
        with _open(self.pixels, os.O_RDWR | os.O_CREAT) as handle:
            if os.fstat(handle).st_size > self.nbytes:
                os.ftruncate(handle, self.nbytes)
            if hasattr(os, "posix_fallocate"):  # elsewhere a full disk is found while writing
                os.posix_fallocate(handle, 0, self.nbytes)

    @contextmanager
    def filling(self) -> Iterator[Callable[[int, Pixels], int]]:
        """Yield a thread-safe function that writes a block's pixels [rows, 3, R, R] and returns its mark."""
        with _open(self.pixels, os.O_RDWR | os.O_CREAT) as handle:

            def put(block: int, pixels: Pixels) -> int:
                _write(handle, pixels.reshape(-1).data, block * self.block_bytes)
                return self._mark(block, pixels.reshape(-1).data)

            yield put

    def mark(self, marks: Mapping[int, int]) -> None:
        """Sync the filled blocks to disk, then write their marks.

        Args:
            marks: block -> its mark.
        """
        with _open(self.pixels, os.O_RDWR) as handle:
            os.fsync(handle)
        with _open(self.marks, os.O_RDWR | os.O_CREAT) as handle:
            for block, mark in marks.items():
                _write(handle, memoryview(mark.to_bytes(8, "little")), 8 * block)
            os.fsync(handle)

    def tensor(self) -> Tensor:
        """Return uint8 [N, 3, R, R], memory-mapped and read-only: the system can reclaim its memory."""
        with _open(self.pixels, os.O_RDONLY) as handle:
            # Not copy-on-write, for which the system may reserve memory.
            mapped = mmap.mmap(handle, self.nbytes, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            return torch.frombuffer(mapped, dtype=torch.uint8).view(self.shape)

    def _read_check(self, handle: int, block: int, buffer: bytearray) -> int:
        size = len(self.ids_of(block)) * self._image
        view = memoryview(buffer)[:size]
        done = 0
        while done < size:
            count = os.preadv(handle, [view[done:]], block * self.block_bytes + done)
            if count == 0:
                return 0
            done += count
        return self._mark(block, view)

    def _mark(self, block: int, pixels: memoryview) -> int:
        return _WRITTEN | zlib.crc32(pixels, (self._seed + block) & _UINT32_MAX)


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _write(handle: int, data: memoryview, at: int) -> None:
    while len(data):
        step = os.pwrite(handle, data, at)
        data, at = data[step:], at + step


_STALE_SECONDS = 30 * 86_400.0  # without use, after which pixels are removed when others are written
_IDLE_SECONDS = 86_400.0  # without use, after which they are removed if space is short


def make_room(folder: Path, need: int, share: float) -> bool:
    """Remove unused pixels if necessary; return whether new ones may be written.

    Args:
        folder: of the new pixels; its neighbours hold others, whose modification time is that of the last use.
        need: bytes; those already in the folder count as free.
        share: of the free disk that they may take.

    Raises:
        OSError: the free disk space is unknown.
    """
    now, have = time.time(), _size(folder)
    for used, other in sorted(_neighbours(folder)):
        fits = need - have <= share * shutil.disk_usage(folder).free
        if now - used < (_STALE_SECONDS if fits else _IDLE_SECONDS):
            break
        # Processes that have mapped these pixels keep them; one that is filling the file holds its lock.
        with try_file_lock(other / "lock") as free:
            if free:
                shutil.rmtree(other, ignore_errors=True)
    return need - have <= share * shutil.disk_usage(folder).free


def _neighbours(folder: Path) -> list[tuple[float, Path]]:
    """Return time of last use and folder of all others."""
    neighbours = []
    for path in folder.parent.glob("*/manifest.json"):
        if path.parent != folder:
            with contextlib.suppress(OSError):
                neighbours.append((path.stat().st_mtime, path.parent))
    return neighbours


def _size(folder: Path) -> int:
    """Return the allocated bytes; a file may have holes."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            total += getattr(path.stat(), "st_blocks", 0) * 512
    return total
