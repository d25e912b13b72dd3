"""Decode an image set once, to a uint8 tensor in memory or a memory-mapped file of the cache; where these do not fit,
to a file of JPEG records, about a tenth of the bytes.

Files are in the cache folder, ``pixels/<key>/``; the key depends on everything that determines the pixels.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
import struct
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from potstill.data.concurrency import ProgressReporter, file_lock, threaded_map, try_file_lock
from potstill.data.image_io import ValueSpan, decoder_version, one_large_image, read_image
from potstill.data.image_sets import (
    ImageSet,
    SquareSet,
    file_digests,
    is_array_based,
    is_file_based,
    read_square,
    small_jpeg_file,
    to_square,
    value_ranges,
)
from potstill.data.preprocessing import square_shape, stretch_with_shape, to_planes
from potstill.errors import StorageError
from potstill.formatting import format_scaled
from potstill.io import cache_folder, write_text
from potstill.record_file import IndexedRecords, RecordFile, pwrite

BLOCK = 2**20  # bytes, approximately
_BLOCKS_PER_CHECK = 16  # blocks that a thread checks at a time

Pixels = NDArray[np.uint8]


class PixelFile:
    """N images of one size, ``pixels.bin`` (uint8 [N, 3, H, W]) with checksums ``done.bin``; see ``RecordFile``.

    A record is a block of images; its bytes depend only on the key, so rewriting one changes nothing for its readers.
    """

    def __init__(self, folder: Path, images: int, shape: tuple[int, int, int], key: str) -> None:
        self.pixels, self.shape = folder / "pixels.bin", (images, *shape)
        self.rows = max(1, BLOCK // math.prod(shape))
        self.block_bytes = self.rows * math.prod(shape)  # the last may be smaller
        self.blocks = -(-images // self.rows)
        self.nbytes = math.prod(self.shape)
        self._seed = int(key[:8], 16)

    def open(self, *, write: bool = True) -> RecordFile:
        """Open both files; OSError: one is missing, if not ``write``, or cannot be opened."""
        checksums = self.pixels.with_name("done.bin")
        return RecordFile(self.pixels, checksums, self.block_bytes, self._seed, size=self.nbytes, write=write)

    def ids_of(self, block: int) -> range:
        """Return the images of a block."""
        return range(block * self.rows, min(self.shape[0], (block + 1) * self.rows))

    def marked(self) -> int:
        """Return the number of blocks with a checksum."""
        with suppress(FileNotFoundError), self.open(write=False) as file:
            return int(np.count_nonzero(file.read_checksums(0, self.blocks)))
        return 0

    def intact(self, on_progress: Callable[[int], None] = lambda blocks: None) -> NDArray[np.bool_]:
        """Return which blocks match their checksums, [blocks].  Reads the whole file."""
        is_intact = np.zeros(self.blocks, np.bool_)
        with suppress(FileNotFoundError), self.open(write=False) as file:
            checksums = file.read_checksums(0, self.blocks)
            marked = np.flatnonzero(checksums)
            pieces = [marked[start : start + _BLOCKS_PER_CHECK] for start in range(0, len(marked), _BLOCKS_PER_CHECK)]
            found = threaded_map(lambda piece: file.intact(piece, checksums[piece]), pieces)
            for piece, same in zip(pieces, found, strict=True):
                is_intact[piece] = same
                on_progress(len(piece))
        return is_intact

    def tensor(self) -> Tensor:
        """Return uint8 [N, 3, H, W], memory-mapped and read-only: the system can reclaim its memory."""
        with self.open(write=False) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(file.mapped(0, self.blocks)).view(self.shape)


_STALE_SECONDS = 30 * 86_400.0  # without use, after which pixels are removed when others are written
_IDLE_SECONDS = 86_400.0  # without use, after which they are removed if space is short


def make_room(folder: Path, need: int, share: float) -> bool:
    """Remove unused pixels beside ``folder`` if necessary; return whether ``need`` bytes fit the share of the disk."""
    now, have = time.time(), _allocated_bytes(folder)
    for used, other in sorted(_neighbours(folder)):
        fits = need - have <= share * shutil.disk_usage(folder).free
        if now - used < (_STALE_SECONDS if fits else _IDLE_SECONDS):
            break
        # Processes that have mapped these pixels keep them; one that is filling the file holds its lock.
        with try_file_lock(other / "lock") as free:
            if free:
                shutil.rmtree(other, ignore_errors=True)
    return need - have <= share * shutil.disk_usage(folder).free


def possible_room(folder: Path, share: float) -> float:
    """Return the bytes that new pixels could take in this folder, unused ones removed; nothing is removed here.

    Args: as those of ``make_room``.

    Raises:
        OSError: the free disk space is unknown.
    """
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    now, free = time.time(), shutil.disk_usage(existing).free
    idle = (other for used, other in _neighbours(folder) if now - used >= _IDLE_SECONDS)
    return share * (free + sum(map(_allocated_bytes, idle)))


def remove_decoded_pixels() -> int:
    """Remove the decoded images of the cache folder; return their bytes.  Those that are being written stay."""
    freed = 0
    for folder in sorted(cache_folder("pixels").glob("*")):
        size = _allocated_bytes(folder) if folder.is_dir() else 0
        with try_file_lock(folder / LOCK) as free:
            if free:
                shutil.rmtree(folder, ignore_errors=True)
                freed += size
    return freed


def _neighbours(folder: Path) -> list[tuple[float, Path]]:
    """Return time of last use and folder of all others."""
    neighbours = []
    for path in folder.parent.glob("*/manifest.json"):
        if path.parent != folder:
            with suppress(OSError):
                neighbours.append((path.stat().st_mtime, path.parent))
    return neighbours


def _allocated_bytes(folder: Path) -> int:
    """Return the allocated bytes; a file may have holes."""
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(OSError):
                total += getattr(path.stat(), "st_blocks", 0) * 512
    return total


_DEFAULT_BYTES = 4 * 2**30  # if the system does not report it
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; of the CPU, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0  # unknown for other accelerators: keep the pixels on the CPU
    return min(_available(), _container_free())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS; half is an estimate
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
    """Return bytes that count for the container's limit but can be reclaimed, such as mapped pixels."""
    rows = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in rows if name in ("inactive_file", "active_file"))


FORMAT = 1
SMALLEST = 2**20  # bytes of pixels from which a file is written
MANIFEST, LOCK = "manifest.json", "lock"
_PROBED = 16  # images that are compared for sets without content hashes
_SYNC_SECONDS = 2.0  # of work that is lost if the process is killed
_SYNC_BYTES = 2**26
_LARGE = 2**30  # bytes from which checking reports its progress
_STALLED = 600.0  # seconds without progress of another process
_FULL = (errno.ENOSPC, errno.EDQUOT)

_reported: "WeakKeyDictionary[ProgressReporter, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class DecodeRequest:
    """N images to decode to squares of ``side`` pixels; ``identity`` identifies them and their content."""

    images: ImageSet
    side: int
    resize_mode: str
    identity: str

    @property
    def nbytes(self) -> int:
        """Bytes of all squares."""
        return len(self.images) * math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a square."""
        return square_shape(self.side, self.resize_mode)

    def folder(self, manifest: str) -> Path:
        """Return the folder of the pixels that a manifest describes; its name is the key."""
        return cache_folder("pixels", hashlib.sha256(manifest.encode()).hexdigest()[:16])

    def manifest(self, records: str | None = None) -> str:
        """Return everything that determines the pixels, as JSON; its SHA-256 is the key.

        Args:
            records: what is stored of each square; None: its pixels.
        """
        names = "\n".join(self.images.names).encode("utf-8", "surrogateescape")
        found = {
            "format": FORMAT,
            "identity": self.identity,
            "content": self._content(),
            "names": hashlib.sha256(names).hexdigest(),
            "images": len(self.images),
            "side": self.side,
            "resize_mode": self.resize_mode,
            "decoder": decoder_version(),
            "ranges": value_ranges(self.images),
            **({} if records is None else {"records": records}),
        }
        return json.dumps(found, indent=2, sort_keys=True) + "\n"

    def _content(self) -> str:
        digests = file_digests(self.images)
        if digests is not None:
            return hashlib.sha256(digests.tobytes()).hexdigest()
        probed = np.unique(np.linspace(0, len(self.images) - 1, _PROBED).astype(int)).tolist()
        pixels = (self.images.pixels(i) for i in probed)
        return hashlib.sha256(b"".join(f"{each.shape}".encode() + each.tobytes() for each in pixels)).hexdigest()


def cached_pixels(request: DecodeRequest, *, share: float, progress: ProgressReporter | None) -> Tensor | None:
    """Return the squares, memory-mapped uint8 [N, *square_shape], from a file of the cache; None: not to be cached."""
    if not hasattr(os, "preadv") or request.nbytes < SMALLEST:  # Windows
        return None
    text = request.manifest()
    folder = request.folder(text)
    file = PixelFile(folder, len(request.images), request.shape, folder.name)
    try:
        if not (
            _read(folder / MANIFEST) == text and file.intact(_check_progress(file, progress)).all()
        ) and not _fill_file(file, folder, text, request, share, progress):
            return None
        with suppress(OSError):  # time of the last use; a cache may be read-only
            os.utime(folder / MANIFEST)
        return file.tensor()
    except (OSError, StorageError) as error:
        reason = f"{folder}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        _report_once(progress, "warn", f"decoded pixels are not cached on disk: {reason}")
        return None


def _fill_file(
    file: PixelFile, folder: Path, text: str, request: DecodeRequest, share: float, progress: ProgressReporter | None
) -> bool:
    """Fill the file, or wait until another process has; return False if there is no space."""
    stall_detector = _StallDetector(file, progress)
    with file_lock(folder / LOCK, stall_detector.check) as waited:
        if waited:
            stall_detector.finish()
        missing = np.flatnonzero(~file.intact())
        if len(missing) and not make_room(folder, file.nbytes, share):
            size, where = format_scaled(file.nbytes, "B"), folder.parent
            _report_once(
                progress,
                "note",
                f"decoded pixels are not cached on disk: {size} is over {100 * share:g} % of the free space in {where}",
            )
            shutil.rmtree(folder, ignore_errors=True)
            return False
        try:
            if _read(folder / MANIFEST) != text:
                write_text(folder / MANIFEST, text)
            if len(missing):
                _decode_missing(file, missing.tolist(), request, progress)
        except (OSError, StorageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in _FULL:
                shutil.rmtree(folder, ignore_errors=True)  # frees the space
            raise
    return True


def _decode_missing(
    file: PixelFile, missing: list[int], request: DecodeRequest, progress: ProgressReporter | None
) -> None:
    images, total = request.images, len(request.images)
    done = total - sum(len(file.ids_of(block)) for block in missing)
    if progress is not None:
        existing = f", of which {done:,} exist already" if done else ""
        progress.note(
            f"decoding {total:,} images once, into {file.pixels} ({format_scaled(file.nbytes, 'B')}){existing}"
        )
    with file.open() as records:
        records.reserve(0, file.blocks)

        def fill(block: int) -> tuple[int, int]:
            ids = file.ids_of(block)
            squares = np.empty((len(ids), *request.shape), np.uint8)
            for position, i in enumerate(ids):
                with one_large_image():
                    squares[position] = read_square(images, i, request.side, request.resize_mode)
            content = squares.reshape(-1).data
            records.write(block, content)
            return block, records.checksum(block, content)

        filled: dict[int, int] = {}
        synced = time.monotonic()
        # Pillow releases the GIL while it decodes; a user's image set may not be thread-safe.
        for block, checksum in threaded_map(fill, missing, threads=_threads(images)):
            filled[block] = checksum
            done += len(file.ids_of(block))
            if progress is not None:
                progress.wait("decoding images", done, total)
            if time.monotonic() - synced > _SYNC_SECONDS or len(filled) * file.block_bytes > _SYNC_BYTES:
                records.mark(np.array(list(filled)), np.array(list(filled.values())))
                filled, synced = {}, time.monotonic()
        records.mark(np.array(list(filled), np.int64), np.array(list(filled.values()), np.uint32))


class _StallDetector:
    """Raises an error if another process that fills the file makes no progress."""

    WHAT = "waiting for another process that decodes images"

    def __init__(self, file: "PixelFile | _JpegFile", progress: ProgressReporter | None) -> None:
        self.file, self.progress = file, progress
        self.marked, self.since = -1, time.monotonic()

    def finish(self) -> None:
        if self.progress is not None:
            self.progress.wait(self.WHAT, self.file.blocks, self.file.blocks)

    def check(self) -> None:
        marked = self.file.marked()
        if marked != self.marked:
            self.marked, self.since = marked, time.monotonic()
            if self.progress is not None:
                self.progress.wait(self.WHAT, marked, self.file.blocks)
        elif time.monotonic() - self.since > _STALLED:
            raise StorageError(
                f"another process holds {self.file.pixels.parent} and has made no progress for ten minutes"
            )


def _check_progress(file: PixelFile, progress: ProgressReporter | None) -> Callable[[int], None]:
    """Return a callback that reports the progress of checking a large file."""
    checked = 0

    def on_progress(blocks: int) -> None:
        nonlocal checked
        checked += blocks
        if progress is not None and file.nbytes > _LARGE:
            progress.wait("checking decoded pixels", checked, file.blocks)

    return on_progress


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _report_once(progress: ProgressReporter | None, severity: str, message: str) -> None:
    if progress is None:
        return
    reported = _reported.setdefault(progress, set())
    if severity not in reported:
        reported.add(severity)
        progress.warn(message) if severity == "warn" else progress.note(message)


Square = tuple[int, str]  # side and resize mode, see ``read_square``


class StagedSquares:
    """Squares of the images that a check decodes, until they are packed: so each file is read and decoded once.

    They are in a file without a name in the cache folder, gone when the process ends; each can be taken once.  Without
    room, or where files are not checked as they have not changed, nothing is staged.
    """

    def __init__(self, wanted: Mapping[str, Collection[Square]], share: float) -> None:
        self._by_split = {split: sorted(set(squares)) for split, squares in wanted.items()}
        self._share = share
        self._wanted: dict[str, list[Square]] = {}
        self._rows: dict[Square, dict[bytes, int]] = {}
        self._handle, self._end, self._lock = -1, 0, threading.Lock()

    def __reduce__(self) -> tuple[type["StagedSquares"], tuple[dict[str, list[Square]], float]]:
        return StagedSquares, ({}, 0.0)  # another process has its own

    def expect(self, names: Sequence[str], splits: Sequence[str] | None) -> None:
        """Stage what these images need in these splits (None: in all) when ``check`` gets their content."""
        union = sorted({square for squares in self._by_split.values() for square in squares})
        given = [union] * len(names) if splits is None else [self._by_split.get(split, []) for split in splits]
        self._wanted = dict(zip(names, given, strict=True))

    def open(self, names: Iterable[str]) -> None:
        """Make room for the squares of these images; without it, nothing is staged."""
        sizes = {square: math.prod(square_shape(*square)) for each in self._by_split.values() for square in each}
        need = sum(sizes[square] for name in names for square in self._wanted.get(name, ()))
        folder = cache_folder("pixels")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fits = 2 * (self._end + need) <= self._share * shutil.disk_usage(folder).free
            if not fits or not need or not hasattr(os, "pwrite"):  # Windows
                self._wanted = {}
            elif self._handle < 0:
                self._handle, name = tempfile.mkstemp(dir=folder)
                os.unlink(name)
                weakref.finalize(self, os.close, self._handle)
        except OSError:
            self._wanted = {}

    def check(self, content: bytes, digest: bytes, name: str, path: str) -> ValueSpan | None:
        """Decode a file, and stage its squares; return the span of its values."""
        wanted = self._wanted.get(name)
        decoded = read_image(content, path, side=wanted[0][0] if wanted else None)
        if not wanted or (decoded.span is not None and decoded.span.kind != "colour"):  # the range is not known yet
            return decoded.span
        side = wanted[0][0]
        for square in wanted:
            if not decoded.serves(side, square[0]):
                side = square[0]
                decoded = read_image(content, path, side=side)
            self._put(digest, square, to_square(decoded, *square))
        return decoded.span

    def _put(self, digest: bytes, square: Square, pixels: Pixels) -> None:
        with self._lock:
            at = self._end
            self._end += pixels.nbytes
        try:
            pwrite(self._handle, at, pixels.reshape(-1).data)
        except OSError:  # the disk is full
            self._wanted = {}
        else:
            self._rows.setdefault(square, {})[digest] = at

    def take(self, digest: bytes, side: int, resize_mode: str) -> Pixels | None:
        """Return the square of the image with this content; None if it is not staged, or was taken before."""
        rows = self._rows.get((side, resize_mode))
        at = None if rows is None else rows.pop(digest, None)
        if rows is None or at is None:
            return None
        shape = square_shape(side, resize_mode)
        found = os.pread(self._handle, math.prod(shape), at)
        if not any(self._rows.values()):
            with suppress(OSError):
                os.ftruncate(self._handle, 0)  # frees the space
        return np.frombuffer(found, np.uint8).reshape(shape) if len(found) == math.prod(shape) else None


JPEG_RECORDS = "JPEG records 1 (quality 90, 4:4:4)"  # with a version, increased with any change of their pixels
_JPEG_OPTIONS: dict[str, Any] = {"format": "JPEG", "quality": 90, "subsampling": 0, "optimize": True}
_SAMPLED = 32  # images whose records are made to estimate the bytes of all
_ESTIMATE_MARGIN = 1.1
_SHAPE = struct.Struct("<II")  # height and width of the image, before each record; 0, 0: the record is its file


class JpegSquares(SquareSet):
    """An image set whose squares have been through JPEG: read from a file of records, or made anew with equal pixels.

    A record is the square as JPEG, or the image's own file if that is a JPEG file with fewer bytes and no more pixels.
    What is missing or damaged in the file, or all where there is no file, is made from the image.

    Args:
        images: N images.
        side: R.
        resize_mode: "crop", "pad", "stretch" or "whole", see ``read_square``.
        records: the file; None: there is none.
    """

    def __init__(self, images: ImageSet, side: int, resize_mode: str, records: IndexedRecords | None = None) -> None:
        super().__init__(images)
        self.side, self.resize_mode, self.records = side, resize_mode, records

    def square(self, i: int) -> Pixels:
        """Return image i as a square, uint8 of ``square_shape``.

        Raises:
            DataError: there is no intact record, and the image cannot be decoded, or has changed.
        """
        record = None if self.records is None else self.records.read(i)
        return self._decode(self.encode(i) if record is None else record, i)

    def encode(self, i: int) -> bytes:
        """Return the record of image i; raises as ``square`` does."""
        square = read_square(self.images, i, self.side, self.resize_mode)
        shape = square[0, -1, :8].tobytes() if self.resize_mode == "whole" else _SHAPE.pack(self.side, self.side)
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(square[:, : self.side].transpose(1, 2, 0))).save(content, **_JPEG_OPTIONS)
        own = small_jpeg_file(self.images, i, content.tell(), self.side)
        return shape + content.getvalue() if own is None else bytes(_SHAPE.size) + own

    def _decode(self, record: bytes, i: int) -> Pixels:
        shape, content = record[: _SHAPE.size], record[_SHAPE.size :]
        if not any(shape):
            decoded = read_image(content, self.names[i], side=self.side)
            return to_square(decoded, self.side, self.resize_mode)
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.load()
            if self.resize_mode != "whole":
                return to_planes(image)
            return stretch_with_shape(image, self.side, _SHAPE.unpack(shape))


@dataclass(frozen=True)
class _JpegFile:
    """N records, ``records.bin`` with their index ``index.bin``; see ``IndexedRecords``."""

    folder: Path
    blocks: int  # N

    @property
    def pixels(self) -> Path:
        return self.folder / "records.bin"

    def open(self, *, write: bool = False) -> IndexedRecords:
        seed = int(self.folder.name[:8], 16)
        return IndexedRecords(self.pixels, self.folder / "index.bin", self.blocks, seed, write=write)

    def marked(self) -> int:
        """Return the number of records that exist."""
        with suppress(FileNotFoundError), closing(self.open()) as records:
            return int(np.count_nonzero(records.exists))
        return 0


def jpeg_squares(
    images: ImageSet,
    side: int,
    resize_mode: str,
    *,
    cache_fraction: float,
    identity: str | None = None,
    progress: ProgressReporter | None = None,
) -> JpegSquares:
    """Return images whose squares have been through JPEG, from a file of the cache, which is filled first if necessary.

    The pixels do not depend on whether there is room for the file; without it they are decoded, encoded and decoded
    again each time.

    Args:
        images: N images.
        side: R, of the square in pixels.
        resize_mode: "crop", "pad", "stretch" or "whole", see ``read_square``.
        cache_fraction: of the free disk that the file may take.
        identity: identifies the images and their content; None: no file.
        progress: receives the progress.

    Raises:
        DataError: an image cannot be decoded.
    """
    squares = JpegSquares(images, side, resize_mode)
    if identity is None or not hasattr(os, "pwrite"):  # Windows
        return squares
    request = DecodeRequest(images, side, resize_mode, identity)
    text = request.manifest(JPEG_RECORDS)
    file = _JpegFile(request.folder(text), len(images))
    try:
        known = _read(file.folder / MANIFEST) == text and file.marked() == file.blocks
        if known or _fill_jpeg_file(file, text, squares, cache_fraction, progress):
            with suppress(OSError):  # time of the last use; a cache may be read-only
                os.utime(file.folder / MANIFEST)
            squares.records = file.open()
    except (OSError, StorageError) as error:
        reason = f"{file.folder}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        _report_once(progress, "warn", f"JPEG records are not cached on disk, which takes time: {reason}")
    return squares


def _fill_jpeg_file(
    file: _JpegFile, text: str, squares: JpegSquares, share: float, progress: ProgressReporter | None
) -> bool:
    """Fill the file, or wait until another process has; return False if there is no space."""
    stall_detector = _StallDetector(file, progress)
    with file_lock(file.folder / LOCK, stall_detector.check) as waited:
        if waited:
            stall_detector.finish()
        if _read(file.folder / MANIFEST) != text:
            write_text(file.folder / MANIFEST, text)
        with closing(file.open(write=True)) as records:
            missing = np.flatnonzero(~records.exists).tolist()
            if not missing:
                return True
            need = records.nbytes + len(missing) * _record_bytes(squares)
            if make_room(file.folder, round(need), share):
                try:
                    _encode_missing(records, missing, squares, need, progress)
                    return True
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
        shutil.rmtree(file.folder, ignore_errors=True)  # frees the space
    size, where = format_scaled(need, "B"), file.folder.parent
    _report_once(
        progress,
        "warn",
        f"JPEG records are not cached on disk: {size} is over {100 * share:g} % of the free space in {where}; each "
        "epoch decodes the files, encodes and decodes them again, to the same pixels (data.cache: raw spares that)",
    )
    return False


def _record_bytes(squares: JpegSquares) -> float:
    """Return the estimated bytes of a record, from evenly spread images."""
    sampled = np.unique(np.linspace(0, len(squares) - 1, _SAMPLED).astype(int)).tolist()
    lengths = threaded_map(lambda i: len(squares.encode(i)), sampled, threads=_threads(squares.images))
    return _ESTIMATE_MARGIN * float(np.mean(list(lengths)))


def _encode_missing(
    records: IndexedRecords, missing: list[int], squares: JpegSquares, need: float, progress: ProgressReporter | None
) -> None:
    total, done, synced, unmarked = len(squares), len(squares) - len(missing), time.monotonic(), 0
    if progress is not None:
        raw = format_scaled(total * math.prod(square_shape(squares.side, squares.resize_mode)), "B")
        existing = f", of which {done:,} exist already" if done else ""
        progress.note(
            f"storing {total:,} images as JPEG of {squares.side} px, into {records.folder} (about "
            f"{format_scaled(need, 'B')}; {raw} as raw pixels){existing}"
        )

    def encode(piece: list[int]) -> list[bytes]:
        found = []
        for i in piece:
            with one_large_image():
                found.append(squares.encode(i))
        return found

    pieces = [missing[start : start + _PIECE] for start in range(0, len(missing), _PIECE)]
    found = threaded_map(encode, pieces, threads=_threads(squares.images))
    for piece, contents in zip(pieces, found, strict=True):
        for i, content in zip(piece, contents, strict=True):
            records.write(i, content)
        done, unmarked = done + len(piece), unmarked + sum(map(len, contents))
        if progress is not None:
            progress.wait("storing images", done, total)
        if time.monotonic() - synced > _SYNC_SECONDS or unmarked > _SYNC_BYTES:
            records.mark()
            synced, unmarked = time.monotonic(), 0
    records.mark()


class _Room:
    """Bytes that decoded pixels may take in memory and on disk, of which ``take`` takes some."""

    def __init__(self, share: float, device: torch.device, processes: int) -> None:
        devices = [device, torch.device("cpu")] if device.type != "cpu" else [device]
        self.memory = [share / processes * free_bytes(each) for each in devices]
        self.disk = 0.0
        with suppress(OSError):
            self.disk = possible_room(cache_folder("pixels", "new"), share)

    def take(self, request: DecodeRequest, need: float, records: str | None = None) -> bool:
        """Return whether there is room for ``need`` bytes of a request; those that are on disk already are free."""
        for at, free in enumerate(self.memory if records is None else ()):
            if need <= free:
                self.memory[at] -= need
                return True
        if not hasattr(os, "preadv"):  # Windows
            return False
        missing = need - _allocated_bytes(request.folder(request.manifest(records)))
        self.disk -= max(0.0, missing)
        return self.disk >= 0 or missing <= 0


def choose_cache(
    requests: Sequence[DecodeRequest], *, device: torch.device, cache_fraction: float, processes: int = 1
) -> tuple[Literal["raw", "jpeg"], str]:
    """Return how the training images of a run are cached, and a sentence about it, empty for raw pixels that fit.

    "jpeg" only if raw pixels fit neither into memory nor on the disk, and records do.

    Args:
        requests: squares of all networks.
        device: of the batches.
        cache_fraction: of free memory, and of the free disk, that pixels may take.
        processes: number of processes on this machine, which share its memory, and one file.
    """
    room = _Room(cache_fraction, device, processes)
    if all(room.take(each, each.nbytes) for each in requests):
        return "raw", ""
    room, raw = _Room(cache_fraction, device, processes), sum(each.nbytes for each in requests)
    needs = [
        len(each.images) * _record_bytes(JpegSquares(each.images, each.side, each.resize_mode)) for each in requests
    ]
    share = f"{100 * cache_fraction:g} % of free memory or disk"
    sides = ", ".join(f"{each.side}" for each in requests)
    if not all(room.take(each, need, JPEG_RECORDS) for each, need in zip(requests, needs, strict=True)):
        return "raw", (
            f"training images are decoded in each epoch: neither their raw pixels ({format_scaled(raw, 'B')}) nor JPEG "
            f"records of them ({format_scaled(sum(needs), 'B')}) fit into {share} (data.cache_fraction)"
        )
    return "jpeg", (
        f"training images are kept as JPEG records of {sides} px (quality 90, 4:4:4), about "
        f"{format_scaled(sum(needs), 'B')}: their raw pixels, {format_scaled(raw, 'B')}, do not fit into {share}. "
        "Pixels differ by about 1.5 of 255 from those of the files, of which val and test are decoded; data.cache: raw "
        "decodes the files in each epoch"
    )


_PIECE = 64  # images that a thread decodes at a time

_DecodedKey = tuple[int, str, torch.device]
_decoded: "WeakKeyDictionary[ImageSet, dict[_DecodedKey, Tensor]]" = WeakKeyDictionary()


def decode_all(
    images: ImageSet,
    side: int,
    resize_mode: str,
    *,
    device: torch.device,
    cache_fraction: float,
    processes: int = 1,
    identity: str | None = None,
    progress: ProgressReporter | None = None,
) -> Tensor | None:
    """Return all images as squares, uint8 [N, *square_shape], decoded once for the lifetime of the image set or, if
    cached on disk by ``identity``, until the images change; None if they fit neither into memory nor on the disk.

    ``processes`` of this machine that call it share the memory; the tensor stays on the CPU if the device has too
    little. ``cache_fraction`` is of free memory and of the free disk.
    """
    size = len(images) * math.prod(square_shape(side, resize_mode))
    cpu = torch.device("cpu")
    devices = [device, cpu] if device.type != "cpu" else [device]
    decoded = _decoded_of(images)
    for each in devices:
        if (side, resize_mode, each) in decoded:
            return decoded[side, resize_mode, each]
    fitting = [each for each in devices if size <= cache_fraction / processes * free_bytes(each)]
    pixels = None
    # Arrays are in memory already, and resizing them is fast.
    if identity is not None and not (fitting and is_array_based(images)):
        pixels = cached_pixels(
            DecodeRequest(images, side, resize_mode, identity), share=cache_fraction, progress=progress
        )
    if pixels is None:
        if not fitting:
            return None
        pixels = _decode_in_memory(images, side, resize_mode, progress)
    target = device if device in fitting else cpu
    pixels = decoded[side, resize_mode, target] = pixels.to(target)
    return pixels


def decode_squares(images: ImageSet, index: list[int], side: int, resize_mode: str) -> Tensor:
    """Return some images as squares, uint8 [B, *square_shape]."""
    return torch.from_numpy(np.stack([read_square(images, i, side, resize_mode) for i in index]))


def _threads(images: ImageSet) -> int | None:
    """Return the threads that decode: Pillow releases the GIL; a user's image set may not be thread-safe."""
    return None if is_file_based(images) else 1


def _decode_in_memory(images: ImageSet, side: int, resize_mode: str, progress: ProgressReporter | None) -> Tensor:
    pixels = torch.empty((len(images), *square_shape(side, resize_mode)), dtype=torch.uint8)
    target = pixels.numpy()

    def put(start: int) -> int:
        end = min(start + _PIECE, len(images))
        for i in range(start, end):
            with one_large_image():
                target[i] = read_square(images, i, side, resize_mode)
        return end

    for done in threaded_map(put, range(0, len(images), _PIECE), threads=_threads(images)):
        if progress is not None:
            progress.wait("decoding images", done, len(images))
    return pixels


def _decoded_of(images: ImageSet) -> dict[_DecodedKey, Tensor]:
    try:
        return _decoded.setdefault(images, {})
    except TypeError:  # a user's image set that cannot be hashed or weakly referenced is decoded each time
        return {}
