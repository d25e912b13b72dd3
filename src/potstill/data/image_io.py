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
* Gray TIFFs of 16 bits in which 0 is white are inverted, as those of 8 bits.
* Colours of 16 bits: the high byte of each channel.
* A JPEG file that will be resized to a square of a known side is decoded at 1/2, 1/4 or 1/8 of its size if both sides
  then still have ``REDUCING_GAP`` times as many pixels: the decoder leaves the rest of the coefficients out.

The range of images of more than 8 bits is found once, over the training images (``data.range: auto``), or given; it is
mapped to 0 to 255.  It is saved with the model and used for every later image.  If each image had its own range, the
same gray would be bright in one image and black in another.  Images of 8 bits are not changed.

AVIF and HEIC, whose structure does not bound the decoder's work, are decoded in processes of their own (this module run
as a script): at most 10 s of CPU and the memory of the limits; beyond, the process dies and the image is refused.
"""

import atexit
import contextlib
import hashlib
import io
import logging
import math
import os
import stat
import struct
import subprocess  # nosec B404 # starts this module itself
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from potstill.data.concurrency import raise_if_cancelled
from potstill.data.image_structure import (
    MAX_EXTRA,
    MAX_PIXELS,
    ImageStructure,
    StoredValues,
    check_extra_memory,
    check_pixel_count,
    parse_structure,
)
from potstill.errors import DataError

ValueRange = tuple[float, float]


class ValueSpan(NamedTuple):
    """Smallest and largest value of one image of more than 8 bits; "colour": 16 bits a channel, no range is applied."""

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
    """Return the range by ``data.range``; "auto": of the training images, or of all if those have 8 bits."""
    if setting != "auto":
        return setting
    found = compute_range(parse_span(contents[name]) for name in train)
    return found if found is not None else compute_range(map(parse_span, contents.values()))


def to_uint8(values: NDArray[Any], ends: ValueRange) -> NDArray[np.uint8]:
    """Map a range to 0 to 255, clipped; integers lose low bits, so that 8 bits stored in 16 return; floats round."""
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
    """Suppress warnings of Pillow's modules within the block, in every thread; overlapping threads share one filter."""
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

MOST_PIXELS = 4_000_000  # an image with more is large
_large_lock = threading.RLock()
_large_scope = threading.local()  # holds the block of ``one_large_image`` that this thread is in


@contextmanager
def one_large_image() -> Iterator[None]:
    """Let only one thread at a time hold a large image within such a block, so that memory does not grow with cores."""
    with ExitStack() as stack:
        _large_scope.stack = stack
        try:
            yield
        finally:
            _large_scope.stack = None


def wait_if_large(large: bool) -> None:
    """Wait until no other thread holds a large image, if this thread is in a block of ``one_large_image``."""
    stack: ExitStack | None = getattr(_large_scope, "stack", None)
    if large and stack is not None:
        stack.enter_context(_large_lock)


MAX_BYTES = 64 * 2**20
JPEG_START = b"\xff\xd8"  # the only format whose pixels depend on ``side``
REDUCING_GAP = 2  # as in Pillow's ``thumbnail``: the resize that follows still halves the image at least
DECODER_VERSION = 4  # increased with every change of decoded pixels, here or in ``resize_to_square``

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def decoder_version() -> str:
    """Return the version of everything that determines a file's pixels: these rules, and the decoding libraries."""
    libraries = (f"{name} {features.version(name)}" for name in ("pil", "libjpeg_turbo", "jpg", "webp", "libtiff"))
    return ", ".join([f"rules {DECODER_VERSION}", *libraries])


class DecodedImage(NamedTuple):
    """An upright RGB image, and facts about its file."""

    image: Image.Image | Pixels  # in Pillow's memory where it can stay there, which spares two copies
    span: ValueSpan | None  # of the values in the file; None: 8 bits
    shape: tuple[int, int]  # height and width in the file, upright; the image may be decoded at a reduced scale
    format: str  # of FORMATS
    mode: str  # Pillow's, such as "RGB", "L", "I;16"

    @property
    def pixels(self) -> Pixels:
        """The pixels, uint8 [H, W, 3]."""
        return _convert_in_bands(self.image) if isinstance(self.image, Image.Image) else self.image

    def serves(self, side: int, other: int) -> bool:
        """Return whether an image that was decoded for a square of one side is also what another side would get."""
        return self.format != "JPEG" or _jpeg_scale(min(self.shape), side) == _jpeg_scale(min(self.shape), other)


def decode(source: Path | bytes, ends: ValueRange | None = None, side: int | None = None) -> Pixels:
    """Decode one image to uint8 RGB [H, W, 3], at a reduced scale if it will be resized to a square of ``side`` pixels.

    ``ends``: the range of images of more than 8 bits; None: the image's own.  Raise DataError, with path and reason,
    for a file that is missing, damaged, of another format or over a limit.
    """
    content = read_file(source) if isinstance(source, Path) else source
    return decode_bytes(content, str(source) if isinstance(source, Path) else "image", ends, side)


def decode_bytes(content: bytes, name: str, ends: ValueRange | None = None, side: int | None = None) -> Pixels:
    """Decode the content of a file; ``name`` is used in messages, the rest as in ``decode``."""
    return read_image(content, name, ends, side).pixels


def read_image(content: bytes, name: str, ends: ValueRange | None = None, side: int | None = None) -> DecodedImage:
    """Decode the content of a file, with the span of its values."""
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


def read_file(path: str | Path) -> bytes:
    """Return the bytes of a file (a pipe would block for ever) of at most ``MAX_BYTES``; else raise DataError."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        with os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path}: not a regular file")
            # A buffer of MAX_BYTES would cost more than reading; a file that states 0 bytes may have some (/proc).
            content = file.read(min(found.st_size or MAX_BYTES, MAX_BYTES) + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not content:
        raise DataError(f"{path}: empty file")
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: more than {MAX_BYTES // 2**20} MiB of file")
    return content


def wide_span(image: Image.Image) -> ValueSpan | None:
    """Return the smallest and largest value of a loaded Pillow image of more than 8 bits; None for one of 8 bits."""
    return _value_span(image, "plain") if image.mode in _WIDE_MODES else None


def to_rgb(image: Image.Image, ends: ValueRange | None = None) -> Pixels:
    """Return pixels [H, W, 3] of a loaded Pillow image by the rules above; the orientation is not applied."""
    if image.mode in _WIDE_MODES:
        return _wide_to_rgb(image, ends)
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
        pixels = decode_isolated(structure.content, structure.format)
        return DecodedImage(pixels, None, (pixels.shape[0], pixels.shape[1]), structure.format, "RGB")
    with _open(structure) as image:
        check_pixel_count(*image.size)
        full = image.size
        if side is not None:
            image.draft(None, (REDUCING_GAP * side, REDUCING_GAP * side))  # of other formats than JPEG: does nothing
        reduced = image.size != full
        width, height = full if "progressive" in image.info else image.size  # all coefficients are in memory
        wait_if_large(width * height > MOST_PIXELS)
        mode = image.mode
        image.load()
        check_pixel_count(*image.size)  # a GIF's first frame may be larger than its header states
        orientation = _orientation(image)
        span: ValueSpan | None = None
        upright: Image.Image | Pixels
        if image.mode == "RGB" and "transparency" not in image.info and not structure.wide:
            upright = image if orientation == 1 else image.transpose(_TRANSPOSITIONS[orientation])
        else:
            if image.mode in _WIDE_MODES:
                span = _value_span(image, structure.values)
                pixels = _wide_to_rgb(image, compute_range([span]) if ends is None else ends, structure.values)
            else:
                pixels = to_rgb(image)
                if structure.wide:
                    span = ValueSpan("colour", *(256.0 * int(pixels.min()), 256.0 * int(pixels.max()) + 255))
            upright = np.ascontiguousarray(_upright(pixels, orientation))
        width, height = full if reduced else image.size
        shape = (width, height) if orientation >= 5 else (height, width)
        return DecodedImage(upright, span, shape, structure.format, mode)


def _open(structure: ImageStructure) -> Image.Image:
    try:
        return Image.open(io.BytesIO(structure.content), formats=(structure.format,))
    except UnidentifiedImageError:
        if not structure.layout:
            raise
        raise DataError(
            f"a TIFF of {structure.layout}, is not supported; save it as gray of 8 to 32 bits, or as colours of 8 or "
            "16 bits"
        ) from None


def _jpeg_scale(shorter: int, side: int) -> int:
    """Return the divisor by which Pillow's ``draft`` reduces a JPEG file for a square of ``side``."""
    return next((scale for scale in (8, 4, 2) if shorter // (REDUCING_GAP * side) >= scale), 1)


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


def _wide_bands(image: Image.Image, stored: StoredValues) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the values of an image of more than 8 bits, 0 black, in bands of rows."""
    width, height = image.size
    for rows in _bands(height, width):
        values: NDArray[Any] = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        if stored == "white_is_zero":
            values = 65535 - values
        yield rows, values.view(np.uint32) if stored == "unsigned" else values


def _wide_to_rgb(image: Image.Image, ends: ValueRange | None = None, stored: StoredValues = "plain") -> Pixels:
    width, height = image.size
    ends = ends or compute_range([_value_span(image, stored)])
    assert ends is not None
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    key = image.info.get("transparency")
    for rows, values in _wide_bands(image, stored):
        gray = to_uint8(values, ends)
        if isinstance(key, int) and not isinstance(key, bool):
            gray[values == key] = 255
        pixels[rows] = gray[..., None]
    return pixels


def _value_span(image: Image.Image, stored: StoredValues) -> ValueSpan:
    """Return the smallest and largest value."""
    low, high = np.inf, -np.inf
    for _, values in _wide_bands(image, stored):
        if not np.isfinite(values).all():
            raise DataError("a pixel is NaN or infinite")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return ValueSpan("float" if image.mode == "F" else "integer", low, high)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8 (1: damaged); read after the pixels, as PNG stores it at the end."""
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


MAX_CPU_SECONDS = 10  # of CPU for an image
_WALL_SECONDS = 120.0  # seconds by the clock, on a machine that is busy
_REQUEST_HEADER = struct.Struct("<4sQ")  # format and length of a request
_RESPONSE_HEADER = struct.Struct("<III")  # height, width, bytes of a reason; 0, 0, n: there are no pixels
_HEIF_EXTRA = "heif"  # of potstill's optional dependencies

_idle_processes: list["_DecoderProcess"] = []
_idle_lock = threading.Lock()


def decode_isolated(content: bytes, kind: str) -> NDArray[np.uint8]:
    """Decode an AVIF or HEIC image in another process: uint8 RGB [H, W, 3], upright."""
    if kind == "HEIC" and find_spec("pillow_heif") is None:
        raise DataError(
            f"a HEIC image; reading it needs the extra {_HEIF_EXTRA}: pip install 'potstill[{_HEIF_EXTRA}]'"
        )
    with _idle_lock:
        child = _idle_processes.pop() if _idle_processes else None
    child = child if child is not None and child.process.poll() is None else _DecoderProcess()
    try:
        pixels = child.decode(content, kind)
    except DataError:
        _return_process(child)
        raise
    except BaseException as error:
        child.kill()
        if isinstance(error, (OSError, EOFError)):
            raise DataError(
                f"{'an' if kind == 'AVIF' else 'a'} {kind} image whose decoding ended its process: beyond the limits "
                f"({MAX_CPU_SECONDS} s of CPU, {MAX_EXTRA // 2**20} MiB more than the pixels), or damaged"
            ) from error
        raise  # interrupted by a signal: the response must not be read by another request
    _return_process(child)
    return pixels


def _return_process(child: "_DecoderProcess") -> None:
    with _idle_lock:
        _idle_processes.append(child)


def _clear_after_fork() -> None:
    """In a forked process: the decoders belong to the parent, and no other thread holds a large image."""
    global _idle_lock, _large_lock
    _idle_lock, _large_lock = threading.Lock(), threading.RLock()
    _idle_processes.clear()


@atexit.register
def close_decoders() -> None:
    """End the idle processes."""
    with _idle_lock:
        waiting = [*_idle_processes]
        _idle_processes.clear()
    for child in waiting:
        child.kill()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clear_after_fork)


class _DecoderProcess:
    """One decoder process."""

    def __init__(self) -> None:
        paths = os.pathsep.join(each for each in sys.path if each)
        self.process = subprocess.Popen(  # nosec B603 # a fixed command line, no shell
            [sys.executable, "-P", "-m", "potstill.data.image_io"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C at a terminal is for the main process
        )

    def decode(self, content: bytes, kind: str) -> NDArray[np.uint8]:
        """Return the pixels; OSError or EOFError if the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watch = threading.Timer(_WALL_SECONDS, self.process.kill)
        watch.daemon = True
        watch.start()
        try:
            self.process.stdin.write(_REQUEST_HEADER.pack(kind.encode(), len(content)))
            self.process.stdin.write(content)
            self.process.stdin.flush()
            height, width, words = _RESPONSE_HEADER.unpack(_read_exactly(self.process.stdout, _RESPONSE_HEADER.size))
            if words or not 0 < height * width <= MAX_PIXELS:
                raise DataError(_read_exactly(self.process.stdout, min(words, 4096)).decode("utf-8", "replace"))
            pixels = np.empty((height, width, 3), np.uint8)
            _read_into(self.process.stdout, pixels.data.cast("B"))
            return pixels
        finally:
            watch.cancel()

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self.process.wait()


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    found = bytearray(count)
    _read_into(stream, memoryview(found))
    return bytes(found)


def _read_into(stream: IO[bytes], target: memoryview) -> None:
    at = 0
    while at < len(target):
        count = stream.readinto(target[at:])  # type: ignore[attr-defined] # typed for some streams only
        if not count:
            raise EOFError("the process has died")
        at += count


# In the process ------------------------------------------------------------------------------------------------------


def serve_decoder() -> None:
    """Decode requests until the input is closed."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else a limit of memory would be one of threads

    _limit_memory()
    while True:
        try:
            kind, length = _REQUEST_HEADER.unpack(_read_exactly(source, _REQUEST_HEADER.size))
            content = _read_exactly(source, length)
        except EOFError:
            return
        _limit_seconds()
        try:
            pixels = _decode_in_child(content, kind.decode())
        except Exception as error:  # as around decode: decoders raise nearly anything
            words = " ".join(str(error).split())[:300] or type(error).__name__
            reason = words if isinstance(error, DataError) else f"damaged image ({words})"
            reason = (
                "too large for the memory that decoding may take: beyond the limits"
                if isinstance(error, MemoryError)
                else reason
            )
            encoded = reason.encode()[:4096]
            sink.write(_RESPONSE_HEADER.pack(0, 0, len(encoded)) + encoded)
        else:
            sink.write(_RESPONSE_HEADER.pack(*pixels.shape[:2], 0))
            sink.write(pixels.data)
        sink.flush()


def _decode_in_child(content: bytes, kind: str) -> NDArray[np.uint8]:
    if kind == "AVIF":
        with Image.open(io.BytesIO(content), formats=("AVIF",)) as image:
            check_pixel_count(*image.size)
            check_extra_memory(image.width, image.height, 12, len(content), "AVIF")
            image.load()
            return to_upright_rgb(image)
    import pillow_heif  # type: ignore[import-not-found,unused-ignore]

    pillow_heif.options.DECODE_THREADS = 1
    found: Any = pillow_heif.open_heif(io.BytesIO(content))
    width, height = found.size
    check_pixel_count(width, height)
    check_extra_memory(width, height, 6, len(content), "HEIC")
    pixels = np.asarray(found)
    if found.mode != "RGB":
        return to_upright_rgb(Image.fromarray(pixels, found.mode))
    return np.ascontiguousarray(pixels)


def _limit_memory() -> None:
    """Limit memory to the present use plus that of the pixels and of decoding."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # no Linux
        return
    most = now + 3 * MAX_PIXELS + MAX_EXTRA
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_seconds() -> None:
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = int(used.ru_utime + used.ru_stime) + MAX_CPU_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (end if hard == resource.RLIM_INFINITY else min(end, hard), hard))


if __name__ == "__main__":
    serve_decoder()
