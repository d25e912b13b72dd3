"""The one way from an image file to pixels: no file can crash, hang or exhaust the process.

Rules, the same for training, evaluation and prediction:

* JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and HEIC, recognised by their content; of several frames, the first.
* At most 64 MiB of file and 40 megapixels, and nothing that ``image_structure`` bounds, before a pixel is decoded.
* EXIF orientation is applied.
* Alpha, a transparent palette entry or a transparent colour: composited over white.
* CMYK: R = (255 - C)(255 - K) / 255, and so on; colour profiles are not applied.
* Gray images of 12 to 32 bits: by one range for a data set, see ``value_range``; where none is given, by the image's
  own.  (``convert("RGB")`` of Pillow clips them to white.)
* Colours of 16 bits: the high byte of each channel.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from potstill.data import isolated
from potstill.data.cores import stop_if_abandoned
from potstill.data.image_structure import FORMATS as FORMATS
from potstill.data.image_structure import MAX_PIXELS, check_pixels, examine
from potstill.data.quiet import quiet_pillow
from potstill.data.value_range import Range, Span, data_range, to_8_bits
from potstill.errors import DataError

Pixels = NDArray[np.uint8]

MAX_BYTES = 64 * 2**20
VERSION = 2  # another one whenever a file gives other pixels than before, here or in ``preprocess.fit``

_ORIENTATION = 0x0112  # EXIF tag
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def decoder() -> str:
    """All that decides the pixels of a file besides its bytes: these rules, and the libraries that decode."""
    libraries = (f"{name} {features.version(name)}" for name in ("pil", "libjpeg_turbo", "jpg", "webp", "libtiff"))
    return ", ".join([f"rules {VERSION}", *libraries])


class Decoded(NamedTuple):
    """An image."""

    pixels: Pixels
    span: Span | None  # of the values in the file, where it has more than 8 bits


def decode(source: Path | bytes, ends: Range | None = None) -> Pixels:
    """Decode one image.

    Args:
        source: a path, or the content of a file.
        ends: the range of images of more than 8 bits; None: the image's own.

    Returns:
        uint8 RGB pixels [H, W, 3].

    Raises:
        DataError: no such file, no image of the formats, damaged, or over a limit; names path and reason.
    """
    content = read_file(source) if isinstance(source, Path) else source
    return decode_bytes(content, str(source) if isinstance(source, Path) else "image", ends)


def decode_bytes(content: bytes, name: str, ends: Range | None = None) -> Pixels:
    """``decode`` of a file that was read already; ``name`` is what messages call it.

    Raises:
        DataError: as ``decode``.
    """
    return read_image(content, name, ends).pixels


def read_image(content: bytes, name: str, ends: Range | None = None) -> Decoded:
    """``decode_bytes``, with the span of the file's values.

    Raises:
        DataError: as ``decode``.
    """
    stop_if_abandoned()
    if not content:
        raise DataError(f"{name}: empty file")
    if len(content) > MAX_BYTES:
        raise DataError(f"{name}: more than {MAX_BYTES // 2**20} MiB of file")
    try:
        with quiet_pillow():
            return _decode(content, ends)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error and more
        raise DataError(f"{name}: {_reason(error)}") from error


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most ``MAX_BYTES``.

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
    """Pixels [H, W, 3] of an image that Pillow has loaded, by the rules above, orientation aside."""
    if image.mode in _WIDE_MODES:
        return _wide_to_rgb(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.mode == "PA" or image.mode in ("RGBA", "LA") or "transparency" in image.info:
        return _over_white(image)
    return _in_bands(image)


def to_upright_rgb(image: Image.Image) -> Pixels:
    """``to_rgb``, with the orientation applied."""
    return np.ascontiguousarray(_upright(to_rgb(image), _orientation(image)))


def _decode(content: bytes, ends: Range | None) -> Decoded:
    structure = examine(content)
    if structure.isolated:
        return Decoded(isolated.decode(structure.content, structure.format), None)
    with Image.open(io.BytesIO(structure.content), formats=(structure.format,)) as image:
        check_pixels(*image.size)
        image.load()
        check_pixels(*image.size)  # a GIF's first frame may be larger than its header says
        span: Span | None = None
        if image.mode in _WIDE_MODES:
            span = _span(image)
            pixels = _wide_to_rgb(image, data_range([span]) if ends is None else ends)
        else:
            pixels = to_rgb(image)
            if structure.wide:
                span = Span("colour", *_high_bytes(pixels))
        return Decoded(np.ascontiguousarray(_upright(pixels, _orientation(image))), span)


def _over_white(image: Image.Image) -> Pixels:
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


def _in_bands(image: Image.Image) -> Pixels:
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for rows in _bands(height, width):
        band = image.crop((0, rows.start, width, rows.stop)) if rows.stop - rows.start < height else image
        pixels[rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _bands(height: int, width: int) -> Iterator[slice]:
    """Rows in pieces of some 2**18 pixels: copies and wide numbers of a whole image could take a gigabyte."""
    step = max(1, 2**18 // width)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def _wide_to_rgb(image: Image.Image, ends: Range | None = None) -> Pixels:
    width, height = image.size
    ends = ends or data_range([_span(image)])
    assert ends is not None
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    key = image.info.get("transparency")
    for rows in _bands(height, width):
        values: NDArray[Any] = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        gray = to_8_bits(values, ends)
        if isinstance(key, int) and not isinstance(key, bool):
            gray[values == key] = 255
        pixels[rows] = gray[..., None]
    return pixels


def _span(image: Image.Image) -> Span:
    """Smallest and largest value."""
    width, height = image.size
    low, high = np.inf, -np.inf
    for rows in _bands(height, width):
        values: NDArray[Any] = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        if not np.isfinite(values).all():
            raise DataError("a pixel is NaN or infinite")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return Span("float" if image.mode == "F" else "integer", low, high)


def _high_bytes(pixels: Pixels) -> tuple[float, float]:
    """The span of 16-bit values of which these are the high bytes."""
    return 256.0 * int(pixels.min()), 256.0 * int(pixels.max()) + 255


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; a damaged EXIF block counts as none.  Read after the pixels: PNG keeps it at the end,
    and Pillow has turned a TIFF by then and removed the tag.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above: the block is a file format of its own, and no reason to refuse the pixels
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


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "damaged image (its header cannot be read)"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} megapixels"
    if isinstance(error, MemoryError):
        return "too large for the memory that is free"
    words = " ".join(str(error).split())[:160]
    return f"damaged image ({words or type(error).__name__})"
