"""Decoded pixels kept in the cache folder, ``pixels/<key>/``, by all that decides them."""

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
from torch import Tensor

from potstill.amounts import scaled
from potstill.artifacts import write_text
from potstill.cache import cache_folder
from potstill.data.cores import in_turn
from potstill.data.decode import decoder
from potstill.data.image_files import digests_of, from_files, ranges_of
from potstill.data.images import ImageSet
from potstill.data.pixel_file import PixelFile
from potstill.data.preprocess import fit
from potstill.data.stale_pixels import make_room
from potstill.data.turns import LOCKS, turn
from potstill.data.watcher import Watcher
from potstill.errors import StorageError

FORMAT = 1
SMALLEST = 2**20  # bytes of pixels that are worth a file
MANIFEST, LOCK = "manifest.json", "lock"
_PROBED = 16  # images, of sets whose content only their owner vouches for
_SYNC_SECONDS = 2.0  # work that a kill may cost
_SYNC_BYTES = 2**26
_LARGE = 2**30  # bytes that take longer than a moment to check
_STALLED = 600.0  # seconds in which another process has filled nothing
_FULL = (errno.ENOSPC, errno.EDQUOT)

_told: "WeakKeyDictionary[Watcher, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Wanted:
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
            "decoder": decoder(),
            "ranges": ranges_of(self.images),
        }
        return json.dumps(found, indent=2, sort_keys=True) + "\n"

    def _content(self) -> str:
        digests = digests_of(self.images)
        if digests is not None:
            return hashlib.sha256(digests.tobytes()).hexdigest()
        probed = np.unique(np.linspace(0, len(self.images) - 1, _PROBED).astype(int)).tolist()
        pixels = (self.images.pixels(i) for i in probed)
        return hashlib.sha256(b"".join(f"{each.shape}".encode() + each.tobytes() for each in pixels)).hexdigest()


def kept_pixels(wanted: Wanted, *, share: float, progress: Watcher | None) -> Tensor | None:
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
    if not LOCKS or wanted.nbytes < SMALLEST:
        return None
    text = wanted.manifest()
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = cache_folder("pixels", key)
    file = PixelFile(folder, len(wanted.images), wanted.side, key)
    try:
        if not (_read(folder / MANIFEST) == text and file.intact(_checking(file, progress)).all()) and not _fill(
            file, folder, text, wanted, share, progress
        ):
            return None
        with contextlib.suppress(OSError):  # the last use; a cache may be read-only
            os.utime(folder / MANIFEST)
        return file.tensor()
    except (OSError, StorageError) as error:
        reason = f"{folder}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        _tell_once(progress, "warn", f"decoded pixels are not kept on disk: {reason}")
        return None


def _fill(file: PixelFile, folder: Path, text: str, wanted: Wanted, share: float, progress: Watcher | None) -> bool:
    """Have the whole file on disk, by this process or another; False: there is no room."""
    patience = _Patience(file, progress)
    with turn(folder / LOCK, patience.look) as waited:
        if waited:
            patience.over()
        missing = np.flatnonzero(~file.intact())
        if len(missing) and not make_room(folder, file.nbytes, share):
            size, where = scaled(file.nbytes, "B"), folder.parent
            _tell_once(
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
                _decode(file, missing.tolist(), wanted, progress)
        except (OSError, StorageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in _FULL:
                shutil.rmtree(folder, ignore_errors=True)  # others need the room
            raise
    return True


def _decode(file: PixelFile, missing: list[int], wanted: Wanted, progress: Watcher | None) -> None:
    images, side, total = wanted.images, wanted.side, len(wanted.images)
    done = total - sum(len(file.ids_of(block)) for block in missing)
    if progress is not None:
        there = f", of which {done:,} are there already" if done else ""
        progress.note(f"decoding {total:,} images once, into {file.pixels} ({scaled(file.nbytes, 'B')}){there}")
    with file.filling() as put:

        def fill(block: int) -> tuple[int, int]:
            ids = file.ids_of(block)
            squares = np.empty((len(ids), 3, side, side), np.uint8)
            for place, i in enumerate(ids):
                squares[place] = fit(images.pixels(i), side, wanted.how)
            return block, put(block, squares)

        filled: dict[int, int] = {}
        synced = time.monotonic()
        # Pillow lets other threads run while it decodes; somebody's own image set may know nothing of threads.
        for block, mark in in_turn(fill, missing, at_once=None if from_files(images) else 1):
            filled[block] = mark
            done += len(file.ids_of(block))
            if progress is not None:
                progress.wait("decoding images", done, total)
            if time.monotonic() - synced > _SYNC_SECONDS or len(filled) * file.block_bytes > _SYNC_BYTES:
                file.mark(filled)
                filled, synced = {}, time.monotonic()
        file.mark(filled)


class _Patience:
    """Waits for another process for as long as that gets on."""

    WHAT = "waiting for another process that decodes images"

    def __init__(self, file: PixelFile, progress: Watcher | None) -> None:
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


def _checking(file: PixelFile, progress: Watcher | None) -> Callable[[int], None]:
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


def _tell_once(progress: Watcher | None, how: str, message: str) -> None:
    if progress is None:
        return
    told = _told.setdefault(progress, set())
    if how not in told:
        told.add(how)
        progress.warn(message) if how == "warn" else progress.note(message)
