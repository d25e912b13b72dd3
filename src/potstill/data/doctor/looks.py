"""One look at one image: its content, its format, and its pixels by the one decode function."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.data.decode import Pixels, read_file, read_image
from potstill.data.doctor import large
from potstill.data.doctor.findings import Finding
from potstill.data.doctor.large import header, one_at_a_time
from potstill.data.images import ImageSet
from potstill.data.known_files import State, state_of, trusted
from potstill.data.value_range import Span
from potstill.errors import DataError

EXTENSIONS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP",
    ".bmp": "BMP", ".dib": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF", ".heic": "HEIC",
    ".heif": "HEIC", ".hif": "HEIC",
}  # fmt: skip

TINY = 8  # pixels: the smallest data.size

UNKNOWN: State = (-1, 0, 0, 0)

# What the decoder says, in the order in which it is asked -> kind of finding.
_WORDS = (
    ("no image of the formats", "no-image"),
    ("empty file", "empty-file"),
    ("megapixels", "oversize"),
    ("MiB of file", "oversize"),
    ("beyond the limits", "oversize"),
    ("needs the extra", "unreadable"),
    ("truncated", "truncated"),
)


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of an image."""

    size: int  # bytes of the file; of the pixels where there is no file
    format: str  # of FORMATS, or "array"
    mode: str  # Pillow's word: "RGB", "L", "I;16"
    width: int  # upright
    height: int
    blank: bool  # all pixels have one colour
    content: bytes  # 32: SHA-256 of the file
    pixels: bytes  # 16: of shape and RGB pixels
    state: State = UNKNOWN  # of the file, where it can be trusted not to have changed since
    span: Span | None = None  # of the values, where they have more than 8 bits


Looker = Callable[[int], Look | Finding]


def files_looker(root: Path, names: list[str]) -> Looker:
    """Looks at file i of those names."""
    return lambda i: look_at_file(root, names[i])


def look_at_file(root: Path, name: str) -> Look | Finding:
    """Read and decode a file; a problem is returned, never raised."""
    path = root / name
    read_at, before = time.time_ns(), state_of(path)
    try:
        with one_at_a_time(before[0] > large.MOST_BYTES):
            content = read_file(path)
            state = trusted(before, state_of(path), read_at)
            return look_at_content(content, name, state or UNKNOWN)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return Finding(kind_of(reason, "unreadable"), name, reason)


def look_at_content(content: bytes, name: str, state: State = UNKNOWN) -> Look | Finding:
    """Decode what was read from a file."""
    kind, mode, pixels = header(content)
    with one_at_a_time(pixels > large.MOST_PIXELS):
        try:
            found, span = read_image(content, name)
        except DataError as error:
            reason = str(error).removeprefix(f"{name}: ")
            return Finding(kind_of(reason, "damaged"), name, reason)
        return _look(found, len(content), kind, mode, hashlib.sha256(content).digest(), state, span)


def images_looker(images: ImageSet) -> Looker:
    """Looks at image i of a set that has no files."""

    def look(i: int) -> Look | Finding:
        try:
            pixels = images.pixels(i)
        except DataError as error:
            return Finding("damaged", images.names[i], str(error).removeprefix(f"{images.names[i]}: "))
        return _look(pixels, pixels.nbytes, "array", "RGB", bytes(32))

    return look


def other_format(name: str, kind: str) -> str | None:
    """Why a file's name says another format than its content, or None; a name without ending says nothing."""
    ending = os.path.splitext(name)[1].lower()
    if not ending or kind == "array" or EXTENSIONS.get(ending) == kind:
        return None
    return f"a {kind} file whose name ends in {ending}"


def _look(
    pixels: Pixels,
    size: int,
    kind: str,
    mode: str,
    content: bytes,
    state: State = UNKNOWN,
    span: Span | None = None,
) -> Look:
    height, width, _ = pixels.shape
    shape = f"{height} {width} ".encode()
    own = hashlib.blake2b(shape, digest_size=16)
    own.update(np.ascontiguousarray(pixels).data)
    return Look(size, kind, mode, width, height, _blank(pixels), content, own.digest(), state, span)


def _blank(pixels: Pixels) -> bool:
    """Row by row, since nearly every image says no in its first."""
    return all(bool((row == pixels[0, 0]).all()) for row in pixels)


def kind_of(reason: str, otherwise: str) -> str:
    """The kind of finding that the decoder's reason is."""
    return next((kind for words, kind in _WORDS if words.lower() in reason.lower()), otherwise)
