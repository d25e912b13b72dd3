"""Read and decode every image once before training, so that a run does not fail later; all problems in one report.

``FileIndex`` caches the content hash of each file below a folder as long as the file is unchanged, judged like git by
its size, modification time, status change time (which no program can set) and inode.  A
file that changed less than two seconds before it was read may change again within the same tick of the file system's
clock: it is not trusted, and read again the next time.

Large images are decoded one at a time over all threads, so that memory does not grow with the number of cores.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from potstill.data.concurrency import ProgressReporter, interprocess_lock, threaded_map
from potstill.data.entries import Finding, raise_problems
from potstill.data.image_io import (
    SPAN_KINDS,
    Pixels,
    ValueSpan,
    decoder_version,
    one_large_image,
    parse_span,
    read_file,
    read_image,
    silence_pillow,
    wait_if_large,
)
from potstill.data.image_sets import ImageSet
from potstill.errors import ArtifactError, DataError, StorageError
from potstill.io import cache_folder, read_checksummed, sha256_hex, write_checksummed

if TYPE_CHECKING:
    from potstill.data.decoded_cache import StagedSquares

FORMAT = 3
RACY = 2_000_000_000  # nanoseconds; FAT has the coarsest clock, of two seconds
# Of a file: its state, the SHA-256 of its content, and the span of its values: number of the kind in
# ``image_io.SPAN_KINDS`` from 1, 0 for images of 8 bits; low; high.
_ROW = np.dtype([("state", "<i8", (4,)), ("digest", "u1", (32,)), ("span", "<f8", (3,))])

FileState = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode
UNKNOWN_STATE: FileState = (-1, 0, 0, 0)  # of no file, or of one that cannot be trusted


@dataclass
class FileIndex:
    """Files below one folder, by [N] names and ``_ROW`` rows, stored at ``path``."""

    path: Path
    names: Sequence[str] = ()
    rows: NDArray[np.void] = field(default_factory=lambda: np.empty(0, _ROW))

    @classmethod
    def load(cls, root: Path, *, decoded: bool) -> "FileIndex":
        """Return the index of a folder's files, decoded or only read; empty if it is missing, damaged, or old."""
        subject = json.dumps([FORMAT, str(root.resolve()), decoder_version() if decoded else None])
        path = cache_folder("known-files", f"{sha256_hex(os.fsencode(subject))[:16]}.bin")
        try:
            content = read_checksummed(path)
        except ArtifactError:
            return cls(path)
        rows = np.frombuffer(content, _ROW, int.from_bytes(content[:8], "little"), 8)
        return cls(path, os.fsdecode(content[8 + rows.nbytes :]).split("\0"), rows)

    def unchanged(self, root: Path, names: Sequence[str]) -> dict[str, str]:
        """Return name -> content description, as given to ``update``, of indexed files that have not changed since."""
        if not self.names:
            return {}
        places = {name: at for at, name in enumerate(self.names)}
        indexed = [(name, places[name]) for name in names if name in places]
        now = np.array([file_state(os.path.join(root, name)) for name, _ in indexed], np.int64).reshape(-1, 4)
        known = self.rows[[at for _, at in indexed]]
        unchanged = (now == known["state"]).all(axis=1)
        columns = (known["digest"], known["span"], unchanged.tolist(), now[:, 0].tolist())
        return {
            name: f"{size} {digest.tobytes().hex()}{_format_span(span)}"
            for (name, _), digest, span, same, size in zip(indexed, *columns, strict=True)
            if same
        }

    def update(self, root: Path, read: Mapping[str, tuple[FileState | None, str]]) -> None:
        """Add files that were read (their state, None if not trusted), remove deleted ones, and save if possible."""
        new = {name: (state, word) for name, (state, word) in read.items() if state is not None}
        old = [i for i, name in enumerate(self.names) if name not in read and os.path.exists(os.path.join(root, name))]
        if not new and len(old) == len(self.names):
            return
        rows = np.zeros(len(new), _ROW)
        if new:  # whole columns: row by row it takes six times as long
            states, words = zip(*new.values(), strict=True)
            digests = bytes.fromhex("".join(word.split(maxsplit=2)[1] for word in words))
            rows["state"], rows["span"] = states, [_span_to_row(word) for word in words]
            rows["digest"] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self.names = [*(self.names[i] for i in old), *new]
        self.rows = np.concatenate([self.rows[old], rows])
        count = len(self.names).to_bytes(8, "little")
        with contextlib.suppress(StorageError):
            write_checksummed(self.path, count + self.rows.tobytes() + os.fsencode("\0".join(self.names)))


def file_state(path: str | Path) -> FileState:
    """Return the values by which a change of a file is detected; a constant if there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return UNKNOWN_STATE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1)


def stable_state(before: FileState, after: FileState, read_at: int) -> FileState | None:
    """Return the state of a file; None if it may have changed unseen since ``read_at`` (ns since 1970)."""
    _, modified, changed, _ = before
    return before if before == after != UNKNOWN_STATE and read_at - max(modified, changed) >= RACY else None


def _span_to_row(word: str) -> tuple[float, float, float]:
    span = parse_span(word)
    return (0.0, 0.0, 0.0) if span is None else (SPAN_KINDS.index(span.kind) + 1.0, span.low, span.high)


def _format_span(row: NDArray[np.float64]) -> str:
    kind, low, high = row.tolist()
    return f" {SPAN_KINDS[int(kind) - 1]} {low!r} {high!r}" if kind else ""


MOST_BYTES = 8 * 2**20  # of a file that is not large, like an image of at most ``image_io.MOST_PIXELS``

_Result = TypeVar("_Result")

_PIECE = 64  # files that a thread reads at a time
_SMALL = 6000  # bytes; measured with two threads: JPEG files of 160 px are faster with one, of 224 px with two
_SAMPLE = 100  # files whose sizes are looked up

_Read = tuple[FileState | None, str]  # a file's state and its content, as ``FileIndex.update`` takes them


def check_files(
    root: Path,
    names: Sequence[str],
    source: str,
    *,
    decode: bool = True,
    progress: ProgressReporter | None = None,
    bad: dict[str, str] | None = None,
    hints: Sequence[str] = (),
    place: Path | None = None,
    staged: "StagedSquares | None" = None,
) -> dict[str, str]:
    """Read and decode files; return name -> size, SHA-256 and, for more than 8 bits, the span of values.

    Files that have not changed since are not read again.  ``bad`` receives name -> reason of files that cannot be
    decoded; without it one DataError names the first twenty and their number, with ``hints`` and ``place`` instead of
    ``root``. ``staged`` receives squares of the images; ``decode=False``: only read, for files verified elsewhere.
    """
    index = FileIndex.load(root, decoded=decode)
    unchanged = index.unchanged(root, names)
    found: list[_Read | DataError] = []
    new: list[str] = []
    good: dict[str, _Read] = {}
    if not all(name in unchanged for name in names):
        with interprocess_lock(cache_folder("locks", f"{index.path.stem}.lock"), "checks these images", progress):
            index = FileIndex.load(root, decoded=decode)  # another process may have checked them just now
            unchanged = index.unchanged(root, names)
            new = [name for name in names if name not in unchanged]
            pieces = [new[start : start + _PIECE] for start in range(0, len(new), _PIECE)]
            if staged is not None:
                staged.open(new)
            check = partial(_check_piece, root, decode, staged)
            for results in threaded_map(check, pieces, threads=1 if _are_small(root, new) else None):
                found += results
                if progress is not None:
                    progress.wait("checking images", len(found), len(new))
            good = {name: each for name, each in zip(new, found, strict=True) if not isinstance(each, DataError)}
            if new:
                index.update(root, good)
    if bad is None:
        shown, named = f"{root}{os.sep}", f"{root if place is None else place}{os.sep}"
        _raise_unreadable(
            (DataError(str(each).replace(shown, named, 1)) for each in found if isinstance(each, DataError)),
            source,
            hints,
        )
    else:
        bad |= {
            name: str(each).removeprefix(f"{os.path.join(root, name)}: ")
            for name, each in zip(new, found, strict=True)
            if isinstance(each, DataError)
        }
    return {name: unchanged.get(name) or good[name][1] for name in names if bad is None or name not in bad}


def _are_small(root: Path, names: Sequence[str]) -> bool:
    """Return whether files are so small that threads lose more time to the interpreter's lock than decoding takes."""
    sample = names[:: max(1, len(names) // _SAMPLE)]
    sizes = sorted(file_state(os.path.join(root, name))[0] for name in sample)
    return bool(sizes) and sizes[len(sizes) // 2] < _SMALL


def _check_piece(root: Path, decode: bool, staged: "StagedSquares | None", names: list[str]) -> list[_Read | DataError]:
    with silence_pillow():  # for a whole piece: setting up the filter takes a twentieth of a small image's time
        # Strings: a Path takes as long to make.
        return [_attempt(partial(_read, os.path.join(root, name), name, decode, staged)) for name in names]


def _read(path: str, name: str, decode: bool, staged: "StagedSquares | None") -> _Read:
    span = None
    with one_large_image():
        content, state = _read_with_state(path)
        digest = hashlib.sha256(content)
        if decode and staged is not None:
            span = staged.check(content, digest.digest(), name, path)
        elif decode:
            span = read_image(content, path).span
    word = f"{len(content)} {digest.hexdigest()}"
    return state, word if span is None else f"{word} {span}"


def _read_with_state(path: str | Path) -> tuple[bytes, FileState | None]:
    """Return a file's content and its state, in a block of ``one_large_image``."""
    read_at, before = time.time_ns(), file_state(path)
    wait_if_large(before[0] > MOST_BYTES)
    content = read_file(path)
    return content, stable_state(before, file_state(path), read_at)


def check_images(images: ImageSet, source: str) -> list[str]:
    """Read every image of a set; return the shape and SHA-256 of its pixels for each."""

    def describe(i: int) -> str:
        pixels = images.pixels(i)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != "uint8" or 0 in pixels.shape:
            raise DataError(f"{images.names[i]}: pixels must be uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
        return f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"

    return _raise_unreadable([_attempt(partial(describe, i)) for i in range(len(images))], source)


def _attempt(read: Callable[[], _Result]) -> _Result | DataError:
    try:
        return read()
    except DataError as error:
        return error


def _raise_unreadable(results: Iterable[_Result | DataError], source: str, hints: Sequence[str] = ()) -> list[_Result]:
    listed = list(results)
    raise_problems(
        source, [str(result) for result in listed if isinstance(result, DataError)], "unreadable image", hints
    )
    return [result for result in listed if not isinstance(result, DataError)]


FORMAT_BY_SUFFIX = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP",
    ".bmp": "BMP", ".dib": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF", ".heic": "HEIC",
    ".heif": "HEIC", ".hif": "HEIC",
}  # fmt: skip

MIN_SIDE = 8  # pixels: the smallest data.size

# Part of the decoder's message -> kind of finding; the first match counts.
_REASON_KINDS = (
    ("no image of the formats", "no-image"),
    ("empty file", "empty-file"),
    ("megapixels", "oversize"),
    ("MiB of file", "oversize"),
    ("beyond the limits", "oversize"),
    ("needs the extra", "unreadable"),
    ("is not supported", "unreadable"),
    ("truncated", "truncated"),
)


@dataclass(frozen=True, slots=True)
class ImageScan:
    """Facts about a decoded image."""

    size: int  # bytes of the file, or of the pixels if there is no file
    format: str  # of FORMATS, or "array"
    mode: str  # Pillow's, such as "RGB", "L", "I;16"
    width: int  # upright
    height: int
    blank: bool  # all pixels have one colour
    content: bytes  # 32: SHA-256 of the file
    pixels: bytes  # 16: of shape and RGB pixels
    state: FileState = UNKNOWN_STATE  # of the file; unknown if it cannot be trusted
    span: ValueSpan | None = None  # of the values; None: 8 bits
    ends: tuple[int, int] = (0, 255)  # smallest and largest value of the RGB pixels


Scanner = Callable[[int], ImageScan | Finding]


def file_scanner(root: Path, names: list[str]) -> Scanner:
    """Return a function that scans file number i."""
    return lambda i: scan_file(root, names[i])


def scan_file(root: Path, name: str) -> ImageScan | Finding:
    """Read and decode a file; a problem is returned, never raised."""
    path = root / name
    try:
        with one_large_image():
            content, state = _read_with_state(path)
            return scan_content(content, name, state or UNKNOWN_STATE)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return Finding(finding_kind(reason, "unreadable"), name, reason)


def scan_content(content: bytes, name: str, state: FileState = UNKNOWN_STATE) -> ImageScan | Finding:
    """Decode the content of a file; a problem is returned, never raised."""
    try:
        found = read_image(content, name)
    except DataError as error:
        reason = str(error).removeprefix(f"{name}: ")
        return Finding(finding_kind(reason, "damaged"), name, reason)
    digest = hashlib.sha256(content).digest()
    return _make_scan(found.pixels, len(content), found.format, found.mode, digest, state, found.span)


def image_set_scanner(images: ImageSet) -> Scanner:
    """Return a function that scans image i of a set without files."""

    def scan(i: int) -> ImageScan | Finding:
        try:
            pixels = images.pixels(i)
        except DataError as error:
            return Finding("damaged", images.names[i], str(error).removeprefix(f"{images.names[i]}: "))
        return _make_scan(pixels, pixels.nbytes, "array", "RGB", bytes(32))

    return scan


def format_mismatch(name: str, kind: str) -> str | None:
    """Return what is wrong if a file's suffix is that of another format; None without a suffix."""
    suffix = os.path.splitext(name)[1].lower()
    if not suffix or kind == "array" or FORMAT_BY_SUFFIX.get(suffix) == kind:
        return None
    return f"a {kind} file whose name ends in {suffix}"


def _make_scan(
    pixels: Pixels,
    size: int,
    kind: str,
    mode: str,
    content: bytes,
    state: FileState = UNKNOWN_STATE,
    span: ValueSpan | None = None,
) -> ImageScan:
    height, width, _ = pixels.shape
    shape = f"{height} {width} ".encode()
    own = hashlib.blake2b(shape, digest_size=16)
    own.update(np.ascontiguousarray(pixels).data)
    return ImageScan(
        size, kind, mode, width, height, _is_uniform(pixels), content, own.digest(), state, span,
        (int(pixels.min()), int(pixels.max())),
    )  # fmt: skip


def _is_uniform(pixels: Pixels) -> bool:
    """Return whether all pixels are equal; row by row, since most images differ in the first row."""
    return all(bool((row == pixels[0, 0]).all()) for row in pixels)


def finding_kind(reason: str, otherwise: str) -> str:
    """Return the kind of finding for a decoder's message."""
    return next((kind for words, kind in _REASON_KINDS if words.lower() in reason.lower()), otherwise)
