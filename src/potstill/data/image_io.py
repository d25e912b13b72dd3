"""Decode image files to pixels; no file can crash, hang or exhaust the process.

Rules, the same for training, evaluation and prediction:

* JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and HEIC, recognised by their content; of several frames, the first.
* At most 64 MiB of file and 40 megapixels, and nothing that exceeds the limits of ``image_structure``, before a pixel
  is decoded.
* EXIF orientation is applied.
* Alpha, a transparent palette entry or a transparent colour: composited over white.
* CMYK: R = (255 - C)(255 - K) / 255, and so on; colour profiles are not applied.
* Gray images of 12 to 32 bits: mapped from one range for a data set, as below; if no range is given, from
  the image's own.  (``convert("RGB")`` of Pillow clips them to white.)
* Colours of 16 bits: the high byte of each channel.
* A JPEG file that will be resized to a square of a known side is decoded at 1/2, 1/4 or 1/8 of its size if both sides
  then still have ``REDUCING_GAP`` times as many pixels: the decoder leaves the rest of the coefficients out.

The range of images of more than 8 bits is found once, over the training images (``data.range: auto``), or given; it is
mapped to 0 to 255.  It is saved with the model and used for every later image.  If each image had its own range, the
same gray would be bright in one image and black in another.  Images of 8 bits are not changed.
"""

import hashlib
import io
import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from potstill.data import isolated_decoder
from potstill.data.concurrency import raise_if_cancelled
from potstill.data.image_structure import MAX_PIXELS, check_pixel_count, parse_structure
from potstill.errors import DataError

ValueRange = tuple[float, float]


class ValueSpan(NamedTuple):
    """Smallest and largest value of one image of more than 8 bits.

    "colour": 16 bits a channel, of which Pillow reads the high byte; no range is applied.
    """

    kind: "SpanKind"
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kind} {self.low!r} {self.high!r}"


SpanKind = Literal["integer", "float", "colour"]
SPAN_KINDS: tuple[SpanKind, ...] = ("integer", "float", "colour")  # stored as numbers from 1


def parse_span(content: str) -> ValueSpan | None:
    """Return the span in a content description "SIZE SHA256 KIND LOW HIGH"; None if it has only size and digest.

    Example:
        >>> parse_span("12 ab integer 0.0 4095.0").high, parse_span("12 ab")
        (4095.0, None)
    """
    words = content.split()
    return ValueSpan(words[2], float(words[3]), float(words[4])) if len(words) == 5 else None  # type: ignore[arg-type]


def compute_range(spans: Iterable[ValueSpan | None]) -> ValueRange | None:
    """Return the range of a set of images; None if all have 8 bits.

    Integers: from 0 to the largest value of the smallest number of bits, at least 8, that holds the set's maximum.
    Floats: [0, 1] if it holds all; else from 0 to the set's maximum.  With negative values, from the set's
    minimum to its maximum.

    Example:
        >>> compute_range([ValueSpan("integer", 3, 900), ValueSpan("integer", 0, 4000), None])
        (0.0, 4095.0)
        >>> (compute_range([ValueSpan("float", 0, 0.5)]), compute_range([ValueSpan("float", -2.5, 1.02)]),
        ... compute_range([None]))
        ((0.0, 1.0), (-2.5, 1.02), None)
    """
    found = [each for each in spans if each is not None and each.kind != "colour"]
    if not found:
        return None
    low, high = min(each.low for each in found), max(each.high for each in found)
    if low >= 0 and all(each.kind == "integer" for each in found):
        return 0.0, 2.0 ** max(8, math.ceil(math.log2(high + 1))) - 1
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    low = min(low, 0.0)
    return low, high if high > low else low + 1


def resolve_range(
    train: Iterable[str], contents: Mapping[str, str], setting: ValueRange | Literal["auto"]
) -> ValueRange | None:
    """Return the value range of a data set's images.

    Args:
        train: names of the training images.
        contents: name -> content description, see ``parse_span``, of all images.
        setting: ``data.range``; "auto": that of the training images, or of all images if those have 8 bits.
    """
    if setting != "auto":
        return setting
    found = compute_range(parse_span(contents[name]) for name in train)
    return found if found is not None else compute_range(map(parse_span, contents.values()))


def to_uint8(values: NDArray[Any], ends: ValueRange) -> NDArray[np.uint8]:
    """Map a range to 0 to 255; values beyond its ends are clipped.

    Integers lose their low bits, so that 8-bit images that were stored in 16 bits, as v * 257 or as v * 256, are
    restored exactly; floats are rounded.

    Args:
        values: of any shape and type.
        ends: low and high.
    """
    low, high = ends
    floats = values.astype(np.float64) - low
    if values.dtype.kind in "iu" and float(low).is_integer() and float(high).is_integer():
        floats *= 256 / (high - low + 1)
    else:
        floats *= 255 / (high - low)
        floats += 0.5
    return np.clip(floats, 0, 255).astype(np.uint8)


def fingerprint_with_range(fingerprint: str, ends: ValueRange | None) -> str:
    """Return the fingerprint of a data set whose images have this value range."""
    if ends is None:
        return fingerprint
    return hashlib.sha256(f"{fingerprint}\nrange {ends[0]!r} {ends[1]!r}".encode()).hexdigest()


def format_range(ends: ValueRange) -> str:
    """Format a range for messages.

    Example:
        >>> format_range((0.0, 4095.0)), format_range((-0.5, 1.02))
        ('[0, 4095]', '[-0.5, 1.02]')
    """
    return f"[{ends[0]:.10g}, {ends[1]:.10g}]"


# Without a handler of its own, Pillow's log lines about odd files would go to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_filter_lock = threading.Lock()
_filter_depth = 0
_saved_filters = warnings.catch_warnings()


@contextmanager
def silence_pillow() -> Iterator[None]:
    """Suppress warnings of Pillow's modules within the block, in every thread.

    ``warnings.catch_warnings`` saves and restores global state, so that overlapping threads would restore each other's;
    here the first thread saves it and the last one restores it.
    """
    global _filter_depth, _saved_filters
    with _filter_lock:
        if _filter_depth == 0:
            _saved_filters = warnings.catch_warnings()
            _saved_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _filter_depth += 1
    try:
        yield
    finally:
        with _filter_lock:
            _filter_depth -= 1
            if _filter_depth == 0:
                _saved_filters.__exit__(None, None, None)


Pixels = NDArray[np.uint8]

MAX_BYTES = 64 * 2**20
JPEG_START = b"\xff\xd8"  # the only format whose pixels depend on ``side``
REDUCING_GAP = 2  # as in Pillow's ``thumbnail``: the resize that follows still halves the image at least
DECODER_VERSION = 3  # increased with every change of decoded pixels, here or in ``resize_to_square``

_ORIENTATION = 0x0112  # EXIF tag
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def decoder_version() -> str:
    """Return the version of everything that determines a file's pixels: these rules, and the decoding libraries."""
    libraries = (f"{name} {features.version(name)}" for name in ("pil", "libjpeg_turbo", "jpg", "webp", "libtiff"))
    return ", ".join([f"rules {DECODER_VERSION}", *libraries])


class DecodedImage(NamedTuple):
    """Pixels of an image, and the span of the values in its file."""

    pixels: Pixels
    span: ValueSpan | None  # None: 8 bits


def decode(source: Path | bytes, ends: ValueRange | None = None, side: int | None = None) -> Pixels:
    """Decode one image.

    Args:
        source: a path, or the content of a file.
        ends: the range of images of more than 8 bits; None: the image's own.
        side: of the square to which the pixels will be resized, in pixels; None: unknown, decode at full size.

    Returns:
        uint8 RGB pixels [H, W, 3].

    Raises:
        DataError: missing, no image of these formats, damaged, or over a limit; names path and reason.
    """
    content = read_file(source) if isinstance(source, Path) else source
    return decode_bytes(content, str(source) if isinstance(source, Path) else "image", ends, side)


def decode_bytes(content: bytes, name: str, ends: ValueRange | None = None, side: int | None = None) -> Pixels:
    """Decode the content of a file; ``name`` is used in messages, the rest as in ``decode``.

    Raises:
        DataError: as ``decode``.
    """
    return read_image(content, name, ends, side).pixels


def read_image(content: bytes, name: str, ends: ValueRange | None = None, side: int | None = None) -> DecodedImage:
    """Decode the content of a file, with the span of its values.

    Raises:
        DataError: as ``decode``.
    """
    raise_if_cancelled()
    if not content:
        raise DataError(f"{name}: empty file")
    if len(content) > MAX_BYTES:
        raise DataError(f"{name}: more than {MAX_BYTES // 2**20} MiB of file")
    try:
        with silence_pillow():
            return _decode(content, ends, side)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error and more
        raise DataError(f"{name}: {_error_reason(error)}") from error


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file of at most ``MAX_BYTES``.

    Raises:
        DataError: missing, unreadable, no regular file (a pipe would block for ever), empty or too large.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        with os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path}: not a regular file")
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not content:
        raise DataError(f"{path}: empty file")
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: more than {MAX_BYTES // 2**20} MiB of file")
    return content


def to_rgb(image: Image.Image) -> Pixels:
    """Return pixels [H, W, 3] of a loaded Pillow image by the rules above; the orientation is not applied."""
    if image.mode in _WIDE_MODES:
        return _wide_to_rgb(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.mode == "PA" or image.mode in ("RGBA", "LA") or "transparency" in image.info:
        return _composite_over_white(image)
    return _convert_in_bands(image)


def to_upright_rgb(image: Image.Image) -> Pixels:
    """Return pixels [H, W, 3] of a loaded Pillow image, with the orientation applied."""
    return np.ascontiguousarray(_upright(to_rgb(image), _orientation(image)))


def _decode(content: bytes, ends: ValueRange | None, side: int | None) -> DecodedImage:
    structure = parse_structure(content)
    if structure.isolated:
        return DecodedImage(isolated_decoder.decode_isolated(structure.content, structure.format), None)
    with Image.open(io.BytesIO(structure.content), formats=(structure.format,)) as image:
        check_pixel_count(*image.size)
        if side is not None:
            image.draft(None, (REDUCING_GAP * side, REDUCING_GAP * side))  # of other formats than JPEG: does nothing
        image.load()
        check_pixel_count(*image.size)  # a GIF's first frame may be larger than its header says
        span: ValueSpan | None = None
        if image.mode in _WIDE_MODES:
            span = _value_span(image)
            pixels = _wide_to_rgb(image, compute_range([span]) if ends is None else ends)
        else:
            pixels = to_rgb(image)
            if structure.wide:
                span = ValueSpan("colour", *_high_bytes(pixels))
        return DecodedImage(np.ascontiguousarray(_upright(pixels, _orientation(image))), span)


def _composite_over_white(image: Image.Image) -> Pixels:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # colour key of a 16-bit PNG, whose pixels Pillow has cut to 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in key)
    width, height = image.size
    mixed = np.empty((height, width, 3), dtype=np.uint8)
    for rows in _bands(height, width):
        rgba = np.asarray(image.crop((0, rows.start, width, rows.stop)).convert("RGBA"))
        alpha = rgba[..., 3:].astype(np.uint32)
        mixed[rows] = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return mixed


def _convert_in_bands(image: Image.Image) -> Pixels:
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for rows in _bands(height, width):
        band = image.crop((0, rows.start, width, rows.stop)) if rows.stop - rows.start < height else image
        pixels[rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _bands(height: int, width: int) -> Iterator[slice]:
    """Yield bands of about 2**18 pixels: copies of a whole image in wide numbers could take a gigabyte."""
    step = max(1, 2**18 // width)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def _wide_to_rgb(image: Image.Image, ends: ValueRange | None = None) -> Pixels:
    width, height = image.size
    ends = ends or compute_range([_value_span(image)])
    assert ends is not None
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    key = image.info.get("transparency")
    for rows in _bands(height, width):
        values: NDArray[Any] = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        gray = to_uint8(values, ends)
        if isinstance(key, int) and not isinstance(key, bool):
            gray[values == key] = 255
        pixels[rows] = gray[..., None]
    return pixels


def _value_span(image: Image.Image) -> ValueSpan:
    """Return the smallest and largest value."""
    width, height = image.size
    low, high = np.inf, -np.inf
    for rows in _bands(height, width):
        values: NDArray[Any] = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        if not np.isfinite(values).all():
            raise DataError("a pixel is NaN or infinite")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return ValueSpan("float" if image.mode == "F" else "integer", low, high)


def _high_bytes(pixels: Pixels) -> tuple[float, float]:
    """Return the span of 16-bit values whose high bytes these are."""
    return 256.0 * int(pixels.min()), 256.0 * int(pixels.max()) + 255


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the EXIF block is damaged.

    Called after the pixels are read: PNG stores it at the end, and Pillow rotates a TIFF and then removes the tag.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to refuse the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation >= 5:  # 5 to 8 swap the sides
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _error_reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "damaged image (its header cannot be read)"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} megapixels"
    if isinstance(error, MemoryError):
        return "too large for the free memory"
    words = " ".join(str(error).split())[:160]
    return f"damaged image ({words or type(error).__name__})"
