"""A file of decoded pixels in blocks with a checksum each: a half-filled or damaged file is never taken for complete.

``pixels.bin``: uint8 [N, 3, R, R].  ``done.bin``: 8 bytes a block: 1 and a CRC-32 of its bytes, or zeros.  Blocks are
synced before they are marked, and compared with their marks before they are used.  A block's bytes depend on the key
alone, so writing one again changes nothing for processes that read it at the same time.

``make_room`` removes files that were not used for long when the disk has no room for a new one.
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

BLOCK = 2**20  # bytes, about
_BLOCKS_PER_CHECK = 16  # blocks that a thread checks at a time
_WRITTEN = 2**32  # beside the checksum
_WORD = 0xFFFFFFFF

Pixels = NDArray[np.uint8]


class PixelFile:
    """N images of R x R pixels.

    Args:
        folder: where the two files are, or will be.
        images: N.
        side: R.
        key: hex digits; bound into the checksums, so that no other file's blocks fit.

    Every call may raise OSError.
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
        """Of all pixels."""
        return self.shape[0] * self._image

    @property
    def block_bytes(self) -> int:
        """Of a block, but perhaps the last."""
        return self.rows * self._image

    def ids_of(self, block: int) -> range:
        """The images of a block."""
        return range(block * self.rows, min(self.shape[0], (block + 1) * self.rows))

    def marked(self) -> NDArray[np.int64]:
        """[blocks]: 0, or a checksum above 2**32."""
        try:
            found = self.marks.read_bytes()[: 8 * self.blocks]
        except FileNotFoundError:
            found = b""
        return np.frombuffer(found.ljust(8 * self.blocks, b"\0"), "<i8").astype(np.int64)

    def intact(self, watch: Callable[[int], None] = lambda blocks: None) -> NDArray[np.bool_]:
        """[blocks]: which are there with the bytes they were marked with.  Reads the whole file.

        Args:
            watch: is told of each so many blocks that were read.
        """
        marks = self.marked()
        found = np.zeros(self.blocks, np.bool_)
        there = np.flatnonzero(marks)
        if not len(there):
            return found
        pieces = [there[start : start + _BLOCKS_PER_CHECK] for start in range(0, len(there), _BLOCKS_PER_CHECK)]
        with _open(self.pixels, os.O_RDONLY) as handle:

            def check(piece: NDArray[np.int64]) -> list[bool]:
                buffer = bytearray(self.block_bytes)
                return [self._read_check(handle, int(block), buffer) == marks[block] for block in piece]

            for piece, same in zip(pieces, threaded_map(check, pieces), strict=True):
                found[piece] = same
                watch(len(piece))
        return found

    def reserve(self) -> None:
        """Take the room on the disk, or fail now instead of later."""
        with _open(self.pixels, os.O_RDWR | os.O_CREAT) as handle:
            if os.fstat(handle).st_size > self.nbytes:
                os.ftruncate(handle, self.nbytes)
            if hasattr(os, "posix_fallocate"):  # where it is missing, writing finds out
                os.posix_fallocate(handle, 0, self.nbytes)

    @contextmanager
    def filling(self) -> Iterator[Callable[[int, Pixels], int]]:
        """A function that puts a block's pixels [rows, 3, R, R] into the file, from any thread, and gives its mark."""
        with _open(self.pixels, os.O_RDWR | os.O_CREAT) as handle:

            def put(block: int, pixels: Pixels) -> int:
                _write(handle, pixels.reshape(-1).data, block * self.block_bytes)
                return self._mark(block, pixels.reshape(-1).data)

            yield put

    def mark(self, marks: Mapping[int, int]) -> None:
        """Make blocks that were filled last, then say so.

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
        """uint8 [N, 3, R, R], mapped: it takes no memory that the system could not take back.  Not to be written to."""
        with _open(self.pixels, os.O_RDONLY) as handle:
            # Not as a copy on write, for which the system might want to set memory aside.
            mapped = mmap.mmap(handle, self.nbytes, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            return torch.frombuffer(mapped, dtype=torch.uint8).view(self.shape)

    def _read_check(self, handle: int, block: int, buffer: bytearray) -> int:
        size = len(self.ids_of(block)) * self._image
        view = memoryview(buffer)[:size]
        there = 0
        while there < size:
            step = os.preadv(handle, [view[there:]], block * self.block_bytes + there)
            if step == 0:
                return 0
            there += step
        return self._mark(block, view)

    def _mark(self, block: int, pixels: memoryview) -> int:
        return _WRITTEN | zlib.crc32(pixels, (self._seed + block) & _WORD)


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


_STALE_SECONDS = 30 * 86_400.0  # seconds without use after which pixels are removed when others come
_IDLE_SECONDS = 86_400.0  # after which they are removed where room is short


def make_room(folder: Path, need: int, share: float) -> bool:
    """Whether the folder's pixels may be written, after others have been removed.

    Args:
        folder: where they will be; its neighbours hold other pixels, and were changed when they were last used.
        need: bytes; those that lie in the folder already count as free.
        share: of the free disk that they may take.

    Raises:
        OSError: the disk does not say how much is free.
    """
    now, have = time.time(), _size(folder)
    for used, other in sorted(_neighbours(folder)):
        fits = need - have <= share * shutil.disk_usage(folder).free
        if now - used < (_STALE_SECONDS if fits else _IDLE_SECONDS):
            break
        # Who has mapped these pixels keeps them until he ends; who is filling the file holds its lock.
        with try_file_lock(other / "lock") as free:
            if free:
                shutil.rmtree(other, ignore_errors=True)
    return need - have <= share * shutil.disk_usage(folder).free


def _neighbours(folder: Path) -> list[tuple[float, Path]]:
    """Time of last use, and folder."""
    found = []
    for path in folder.parent.glob("*/manifest.json"):
        if path.parent != folder:
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.parent))
    return found


def _size(folder: Path) -> int:
    """Bytes on the disk; not what a file's length says, since it may have holes."""
    found = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found += getattr(path.stat(), "st_blocks", 0) * 512
    return found
