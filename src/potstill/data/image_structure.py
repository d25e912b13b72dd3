"""Limit the work and memory that an image file demands, by its structure, before it is decoded.

A few kilobytes can demand hours of work or gigabytes of memory from a decoder: scans that repeat, tiles larger than
the image, millions of chunks.  The structure of each format is therefore walked here, without decoding a pixel, and
refused where the work or the memory would exceed a limit.  Metadata that no pixel depends on, and on which Pillow would
fail or spend time, is left out of the input of the decoder.

``foreign_file_hint`` names the type of a file of no supported format, for messages: most are a failed download or
export.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from potstill.errors import DataError

TEXT_HEAD = 1024  # bytes by which a text file, or any other, is recognised

# First bytes -> type of the file, and what to do.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file; fetch the files with: git lfs pull"),
    (b"%PDF", "a PDF document; export its pages as images"),
    (b"\xff\x0a", "a JPEG XL image; convert it"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image; convert it"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image; convert it"),
    (b"II*\0\x10\0\0\0CR", "a camera's raw file (CR2); develop it to JPEG or TIFF first"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (RAF); develop it to JPEG or TIFF first"),
    (b"IIRO", "a camera's raw file (ORF); develop it to JPEG or TIFF first"),
    (b"IIRS", "a camera's raw file (ORF); develop it to JPEG or TIFF first"),
    (b"IIU\0", "a camera's raw file (RW2); develop it to JPEG or TIFF first"),
    (b"8BPS", "a Photoshop document; export it"),
    (b"PK\3\4", "a zip archive (or an Office document); unpack it"),
    (b"PK\5\6", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (b"BZh", "a bzip2 file; unpack it"),
    (b"\xfd7zXZ\0", "an xz file; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video; export frames as images"),
    (b"\0\0\1\0", "a Windows icon; convert it"),
    (b"\0\5\x16\7", "an AppleDouble file (macOS keeps attributes in it); delete it"),
    (b"\x93NUMPY", "a NumPy array; save it as PNG or TIFF"),
    (b"\x89HDF", "an HDF5 file; export its arrays as images"),
    (b"SIMPLE  =", "a FITS file; export it as TIFF"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image; convert it"),
    (b"#?RADIANCE", "a Radiance HDR image; convert it"),
    (b"DDS ", "a DDS texture; convert it"),
    (b"%!PS", "a PostScript file; convert it"),
    (b"\xd0\xcf\x11\xe0", "an old Office document or Thumbs.db"),
    (b"SQLite format 3", "an SQLite data base"),
    (b"ID3", "a sound file"),
    (b"\x7fELF", "a program"),
)
_ISO_BRANDS = {b"crx ": "a camera's raw file (CR3); develop it to JPEG or TIFF first", b"jxl ": "a JPEG XL image"}


def foreign_file_hint(content: bytes) -> str:
    """Return the end of a sentence with the type of a file, or its first bytes."""
    found = _identify(content)
    if found is not None:
        return f", but {found}"
    return f" (it starts with {content[:8].decode('latin-1')!a})"


def _identify(content: bytes) -> str | None:
    for magic, description in _MAGIC:
        if content.startswith(magic):
            return description
    if content[4:8] == b"ftyp":
        return _ISO_BRANDS.get(content[8:12], "a video (MP4 or MOV); export frames as images")
    if content[4:8] in (b"moov", b"mdat", b"wide", b"free"):
        return "a video (MOV); export frames as images"
    if content[:4] == b"RIFF":
        return {b"AVI ": "an AVI video; export frames as images", b"WAVE": "a sound file"}.get(content[8:12])
    if content[128:132] == b"DICM":
        return "a DICOM file; export its pixels as 16-bit PNG or TIFF"
    if content[257:262] == b"ustar":
        return "a tar archive; unpack it, or give it as shards (NAME.tar)"
    if not content.strip(b"\0"):
        return "a file of zero bytes alone; most likely a copy that broke off"
    return _identify_text(content[:TEXT_HEAD])


def _identify_text(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "a text file (UTF-16)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page; most likely a download that ended at a login or an error page"
    if b"<svg" in text:
        return "an SVG drawing; export it as PNG"
    if b"<html" in text:
        return "an HTML page; most likely a download that ended at a login or an error page"
    if text.startswith(b"<?xml") or (text.startswith(b"<") and b"<error" in text):
        return "an XML text; most likely a storage's error message in place of the image"
    if text.startswith((b"{", b"[")) and b'"' in text:
        return "a JSON text; most likely a server's error message in place of the image"
    try:
        plain = head.decode("utf-8", "strict" if len(head) < TEXT_HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    words = sum(each.isprintable() or each.isspace() for each in plain)
    return "a text file" if plain and words == len(plain) and len(plain) > 3 else None


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIC")
MAX_PIXELS = 40_000_000
MAX_EXTRA = 190 * 2**20  # bytes that decoding may take above 3 for each pixel; 10 MiB less than what is promised

_MAX_SEGMENTS = 5_000  # of a JPEG before its first scan
_MAX_HEADER = 2**18  # bytes of such segments that Pillow may see: it joins those of EXIF one by one
_MAX_JUNK = 2**20  # bytes between segments or blocks, over which Pillow goes one by one
_MAX_SCANS = 500
_MAX_SCANNED_BLOCKS = 40_000_000  # blocks times scans: some 70 ns each in a nearly empty scan
_ARITHMETIC = 16  # times slower than Huffman codes if a code takes next to no bits
_MAX_CHUNKS = 200_000
_MAX_DATA_CHUNKS = 1_000  # that Pillow may see: it joins them one by one
_MAX_KEPT_CHUNK = 2**16
_MAX_TEXTS = 4
_MAX_INFLATED = 2**19
_MAX_SUB_BLOCKS = 100_000
_MAX_TAGS = 1_000
_MAX_TAG_VALUES = 2**20
_MAX_TILES = 100_000
_MAX_RLE_STEPS = 10_000_000  # Pillow reads run lengths in Python, some 0.3 us a step

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BMP_RLE = (1, 2)
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # in which Pillow looks for an orientation


@dataclass(frozen=True)
class ImageStructure:
    """A file that may be decoded."""

    format: str  # of FORMATS
    content: bytes  # for the decoder: the file, or the file without metadata
    isolated: bool = False  # to be decoded in a separate process: its structure does not bound the work
    wide: bool = False  # 16 bits a colour channel, of which Pillow reads the high byte
    values: "StoredValues" = "plain"  # what the gray values of a TIFF need that Pillow does not do
    layout: str = ""  # of a TIFF, for messages; "" if its header is cut off


StoredValues = Literal["plain", "white_is_zero", "unsigned"]  # 16 bits to invert; 32 bits that Pillow reads as signed


IMAGE_HEAD = 16  # bytes that ``begins_as_image`` needs
_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
)  # fmt: skip


# Suffixes of images, including formats that are not supported: such a file always counts as an image.
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jxr", ".psd", ".psb",
    ".svg", ".ico", ".tga", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".exr", ".hdr", ".dcm", ".nii", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw",
}  # fmt: skip


def has_image_suffix(name: str) -> bool:
    """Return whether a file's name has the suffix of an image, in any case."""
    return "." in name and f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def begins_as_image(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of a supported format."""
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4)  # reserved; two letters alone may be text
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    boxed = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
    return boxed or head.startswith(_SIGNATURES)


def parse_structure(content: bytes) -> ImageStructure:
    """Recognise a file by its content and limit the work and memory of decoding it; else raise DataError."""
    if content.startswith(b"\xff\xd8\xff"):
        return ImageStructure("JPEG", _limit_jpeg(content))
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return ImageStructure("PNG", _strip_png(content), wide=content[24:25] == b"\x10" and content[25] in (2, 4, 6))
    if content.startswith((b"GIF87a", b"GIF89a")):
        return ImageStructure("GIF", _strip_gif(content))
    if content.startswith(b"BM"):
        _limit_bmp(content)
        return ImageStructure("BMP", content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        _limit_webp(content)
        return ImageStructure("WEBP", content)
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and not content.startswith(b"II*\0\x10\0\0\0CR"):
        return _limit_tiff(content)
    if kind := _iso_image(content):
        return ImageStructure(kind, content, isolated=True)
    raise DataError(f"no image of the formats {', '.join(FORMATS)}{foreign_file_hint(content)}")


def check_pixel_count(width: int, height: int) -> None:
    """Compare the size of an image with the limit."""
    if width < 1 or height < 1:
        raise DataError(f"no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than {MAX_PIXELS // 1_000_000} megapixels")


def check_extra_memory(width: int, height: int, bytes_per_pixel: float, fixed: int, what: str) -> None:
    """Compare the memory of decoding, beyond 3 bytes for each pixel, with the limit; 8 bytes a row are added."""
    extra = int(width * height * max(0.0, bytes_per_pixel - 3)) + 8 * height + fixed
    if extra > MAX_EXTRA:
        raise DataError(
            f"decoding {width} x {height} pixels of {what} takes {extra // 2**20:,} MiB more than the pixels, "
            f"beyond the limits ({MAX_EXTRA // 2**20} MiB); save it smaller, or as a JPEG that is not progressive"
        )


# JPEG ----------------------------------------------------------------------------------------------------------------


def _limit_jpeg(content: bytes) -> bytes:
    """Return the file, without metadata if its header is long; limit scans times blocks, and memory of coefficients."""
    segments, scan = _jpeg_segments(content)
    frames = [(marker, start) for marker, start, _ in segments if marker in _JPEG_FRAMES]
    if scan is None or not frames:
        return content  # the decoder reports the error
    coding, start = frames[-1]
    frame = content[start + 4 : scan]
    if len(frame) < 6:
        return content
    height, width = struct.unpack_from(">HH", frame, 1)
    check_pixel_count(width, height)
    # libjpeg reads one scan if it has all components of a frame that is not progressive.
    single = coding in (0xC0, 0xC1, 0xC3, 0xC9) and content[scan + 4 : scan + 5] == frame[5:6]
    scans = 1 if single else content.count(b"\xff\xda", scan)
    blocks = _jpeg_blocks(frame, width, height)
    work = scans * (blocks + 2_000) * (_ARITHMETIC if coding >= 0xC9 else 1)  # beginning a scan costs some blocks
    if scans > _MAX_SCANS or (scans > 1 and work > _MAX_SCANNED_BLOCKS):
        raise DataError(
            f"a JPEG of {width} x {height} pixels in {scans:,} scans takes too long to decode, beyond the limits; a "
            "progressive JPEG has about 10"
        )
    kept = 128 * blocks / (width * height) if scans > 1 or coding in (0xC2, 0xCA) else 0
    if scan > _MAX_HEADER:
        stripped = b"".join([content[:2], *_needed_segments(content, segments), content[scan:]])
    else:
        stripped = content
    files = len(content) + (len(stripped) if stripped is not content else 0)
    check_extra_memory(width, height, max(7.0, 4 + kept), files, "this progressive JPEG" if scans > 1 else "this JPEG")
    return stripped


def _jpeg_segments(content: bytes) -> tuple[list[tuple[int, int, int]], int | None]:
    """Return marker, start and end of each segment before the first scan, and its position (None without a scan)."""
    found: list[tuple[int, int, int]] = []
    at, steps, size = 2, 0, len(content)
    while (start := at if content[at : at + 1] == b"\xff" else content.find(b"\xff", at)) >= 0:
        steps += 1 + (start - at)
        at = start + 1
        while at < size and content[at] == 0xFF and steps <= _MAX_JUNK:
            at, steps = at + 1, steps + 1
        if steps > _MAX_JUNK or len(found) > _MAX_SEGMENTS:
            raise DataError("a JPEG of too many segments, or too much between them: beyond the limits")
        if at >= size or content[at] == 0xD9:
            break
        marker = content[at]
        if marker == 0xDA:
            return found, at - 1
        end = at + 1
        if marker not in (0x00, 0x01) and not 0xD0 <= marker <= 0xD8:
            end += max(2, int.from_bytes(content[at + 1 : at + 3], "big"))
        found.append((marker, at - 1, end))
        at = end
    return found, None


def _needed_segments(content: bytes, segments: list[tuple[int, int, int]]) -> Iterator[bytes]:
    """Yield tables, frames, and the first JFIF, EXIF, XMP and Adobe segments."""
    seen: set[bytes] = set()
    for marker, start, end in segments:
        if marker in (0xC4, 0xCC, 0xDB, 0xDD) or marker in _JPEG_FRAMES:
            yield content[start:end]
        elif marker in (0xE0, 0xE1, 0xEE) and (key := bytes([marker]) + content[start + 4 : start + 8]) not in seen:
            seen.add(key)
            yield content[start:end]


def _jpeg_blocks(frame: bytes, width: int, height: int) -> int:
    """Return the number of 8 x 8 blocks of all components, padded to whole units."""
    factors = [frame[at] for at in range(7, 6 + 3 * frame[5], 3) if at < len(frame)]
    across = max((each >> 4 for each in factors), default=1) or 1
    down = max((each & 15 for each in factors), default=1) or 1
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    return int(units * sum((each >> 4) * (each & 15) for each in factors))


# PNG -----------------------------------------------------------------------------------------------------------------


def _strip_png(content: bytes) -> bytes:
    """Return the file with only the chunks that pixels and orientation depend on; many IDAT chunks are joined."""
    if content[12:16] == b"IHDR":
        width, height, bits, colour = struct.unpack_from(">IIBB", content, 16) if len(content) > 25 else (1, 1, 8, 2)
        check_pixel_count(width, height)
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 4)
        row = width * channels * bits // 8
        check_extra_memory(width, height, 7 if channels > 1 else 5, 3 * row + len(content), "this PNG")
    chunks = list(_png_chunks(content))
    kinds = [kind for kind, _, _ in chunks]
    if kinds.count(b"IDAT") < _MAX_DATA_CHUNKS and len(kinds) < 2 * _MAX_DATA_CHUNKS and _PNG_PIXELS.issuperset(kinds):
        return content
    pieces = [content[:8]]
    texts = 0
    for kind, group in itertools.groupby(chunks, key=lambda chunk: chunk[0]):
        for _, start, end in [(kind, 0, 0)] if kind == b"IDAT" else group:
            if kind == b"IDAT":
                pieces += _join_chunks(content, [(first, last) for _, first, last in group])
            elif kind in _PNG_PIXELS:
                pieces.append(content[start : end + 12])
            elif kind == b"eXIf" and end - start <= _MAX_KEPT_CHUNK:
                pieces += _chunk(kind, content[start + 8 : end + 8])
            elif texts < _MAX_TEXTS and _has_orientation(kind, content[start + 8 : end + 8]):
                pieces += _chunk(kind, content[start + 8 : end + 8])
                texts += 1
    return b"".join(pieces)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start, and start plus length of each chunk; the last may be cut off."""
    at, size, count = 8, len(content), 0
    while at + 8 <= size:
        length = int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        yield kind, at, at + length
        if kind == b"IEND" or not kind.isalpha():
            return
        at += length + 12
        count += 1
        if count > _MAX_CHUNKS:
            raise DataError(f"a PNG of more than {_MAX_CHUNKS:,} chunks: beyond the limits")


def _join_chunks(content: bytes, positions: list[tuple[int, int]]) -> list[bytes]:
    """Return IDAT chunks, joined if there are many and the last is complete."""
    if len(positions) < _MAX_DATA_CHUNKS or positions[-1][1] + 12 > len(content):
        return [content[positions[0][0] : positions[-1][1] + 12]]
    return _chunk(b"IDAT", b"".join(content[start + 8 : end + 8] for start, end in positions))


def _chunk(kind: bytes, data: bytes) -> list[bytes]:
    return [len(data).to_bytes(4, "big"), kind, data, zlib.crc32(data, zlib.crc32(kind)).to_bytes(4, "big")]


def _has_orientation(kind: bytes, data: bytes) -> bool:
    """Return whether a text chunk may hold an orientation and is quick to read."""
    key, _, text = data.partition(b"\0")
    if key not in _PNG_TEXTS or len(data) > _MAX_KEPT_CHUNK:
        return False
    if kind != b"zTXt":
        return kind == b"tEXt" or (kind == b"iTXt" and text.startswith(b"\0\0"))
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(text[1:], _MAX_INFLATED)
    except zlib.error:
        return False
    return text.startswith(b"\0") and not inflater.unconsumed_tail


# GIF -----------------------------------------------------------------------------------------------------------------


def _strip_gif(content: bytes) -> bytes:
    """Return the file without extensions before its first image: Pillow joins them one by one."""
    if len(content) < 13:
        return content
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = start = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 128 else 0)
    control, steps, size = b"", 0, len(content)
    while at < size and content[at] not in (0x2C, 0x3B):
        if content[at] != 0x21:
            at, steps = at + 1, steps + 1
        else:
            end = at + 2
            while end < size and content[end]:
                end, steps = end + 1 + content[end], steps + 1
                if steps > _MAX_SUB_BLOCKS:
                    break
            end += 1
            if content[at + 1 : at + 2] == b"\xf9":
                control = content[at:end]
            at, steps = end, steps + 1
        if steps > _MAX_SUB_BLOCKS:
            raise DataError(f"a GIF of more than {_MAX_SUB_BLOCKS:,} blocks before its first image: beyond the limits")
    if content[at : at + 1] == b"\x2c" and at + 9 <= size:
        left, top, own_width, own_height = struct.unpack_from("<HHHH", content, at + 1)
        width, height = max(width, left + own_width), max(height, top + own_height)
    check_pixel_count(width, height)
    check_extra_memory(width, height, 5, 2 * size, "this GIF")
    return content if at - len(control) == start else content[:start] + control + content[at:]


# BMP, WebP -----------------------------------------------------------------------------------------------------------


def _limit_bmp(content: bytes) -> None:
    """Limit the steps of run lengths, which Pillow decodes in Python, and the memory."""
    if len(content) < 34 or int.from_bytes(content[14:18], "little") < 40:
        return  # of the oldest kind, at most 65535 x 65535, and without run lengths
    width, height = struct.unpack_from("<ii", content, 18)
    compression = int.from_bytes(content[30:34], "little")
    check_pixel_count(width, abs(height))
    if compression not in _BMP_RLE:
        check_extra_memory(width, abs(height), 7, len(content), "this BMP")
        return
    steps = len(content) // 2 + width * abs(height)
    if steps > _MAX_RLE_STEPS:
        raise DataError(
            f"a BMP of {width} x {abs(height)} pixels in run lengths takes too long to decode: beyond the limits"
        )


def _limit_webp(content: bytes) -> None:
    """Limit the canvas, for which libwebp allocates memory as soon as it opens a file."""
    kind, data = content[12:16], content[20:30]
    if len(data) < 10:
        return
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        word = int.from_bytes(data[1:5], "little")
        width, height = (word & 0x3FFF) + 1, (word >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        return
    check_pixel_count(width, height)
    check_extra_memory(width, height, 16, len(content), "WebP")


# TIFF ----------------------------------------------------------------------------------------------------------------

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _STRIPS, _SAMPLES, _ROWS = 256, 257, 258, 259, 273, 277, 278
_PLANES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _SUBFILE, _CHILDREN, _DNG = 284, 322, 323, 324, 254, 330, 50706
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}  # by _SAMPLE_FORMAT
_JPEG_IN_TIFF, _LIBTIFF_SCANS = (6, 7), 100  # of which libtiff itself refuses more
_POINTERS = (330, 34665, 34853, 40965)  # to further directories, which Pillow reads

Tags = dict[int, tuple[int, int, int]]  # tag -> type, number of values, place of the first


def _limit_tiff(content: bytes) -> ImageStructure:
    """Limit tags, values, strips and tiles of the first image, and refuse what Pillow would decode to other values."""
    order = "<" if content.startswith(b"I") else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    at = _number(content, order + "Q", 8) if big else _number(content, order + "I", 4)
    tags = _directory(content, order, big, at)

    def value(tag: int, otherwise: int) -> int:
        kind, count, place = tags.get(tag, (0, 0, 0))
        return _number(content, order + _CODES[kind], place) if count and kind in _CODES else otherwise

    if _DNG in tags or (value(_SUBFILE, 0) & 1 and _CHILDREN in tags):
        raise DataError(
            f"no image of the formats {', '.join(FORMATS)}, but a camera's raw file (DNG, NEF, ARW), of which only a "
            "small preview could be read; develop it to JPEG or TIFF first"
        )
    for tag in _POINTERS:
        if tag in tags:
            _directory(content, order, big, value(tag, 0))
    width, height = value(_WIDTH, 1), value(_HEIGHT, 1)
    check_pixel_count(width, height)
    bits, samples = value(_BITS, 1), value(_SAMPLES, tags.get(_BITS, (0, 1, 0))[1])
    separate = value(_PLANES, 1) == 2
    tiled = _TILES in tags or _TILE_WIDTH in tags
    across, down = value(_TILE_WIDTH, width), value(_TILE_HEIGHT, height)
    if not tiled:
        across, down = width, min(height, value(_ROWS, height) or height)
    pieces = -(-width // max(1, across)) * -(-height // max(1, down)) * (samples if separate else 1)
    pieces = max(pieces, tags.get(_TILES if tiled else _STRIPS, (0, 0, 0))[1])
    if pieces > _MAX_TILES:
        raise DataError(f"a TIFF in {pieces:,} tiles or strips: beyond the limits ({_MAX_TILES:,})")
    piece = across * down * -(-bits * (1 if separate else samples) // 8)
    kind = value(_COMPRESSION, 1)
    if kind in _JPEG_IN_TIFF and b"\xff\xc2" in content:
        scans = min(content.count(b"\xff\xda"), _LIBTIFF_SCANS)
        if scans * width * height * samples > 64 * _MAX_SCANNED_BLOCKS:
            raise DataError("a TIFF of progressive JPEGs in many scans takes too long to decode: beyond the limits")
    check_extra_memory(
        width, height, 7, len(content) + (piece if kind != 1 or tiled else 0), "this TIFF with its strips or tiles"
    )
    white_is_zero, numbers = value(_PHOTOMETRIC, 1) == 0, value(_SAMPLE_FORMAT, 1)
    if numbers == 2 and bits == 8 and samples == 1:
        raise DataError("a TIFF of signed 8-bit integers is not supported; save it with 16 bits, or unsigned")
    if numbers == 3 and white_is_zero:
        raise DataError("a TIFF of floats in which 0 is white is not supported; save it with 0 as black")
    if bits == 16 and samples > 1 and separate and kind == 1:
        raise DataError(
            "a TIFF of 16-bit channels in separate planes is not supported; save it with interleaved channels"
        )
    values: StoredValues = "plain"
    if samples == 1 and white_is_zero and bits == 16:
        values = "white_is_zero"
    elif samples == 1 and numbers == 1 and bits == 32:
        values = "unsigned"
    channels = f"{samples} channels of " if samples > 1 else ""
    layout = (
        f"{channels}{bits}-bit {_NUMBERS.get(numbers, 'numbers')}, photometric interpretation {value(_PHOTOMETRIC, 1)}"
    )
    whole = _STRIPS in tags or _TILES in tags
    return ImageStructure("TIFF", content, wide=bits > 8 and samples > 1, values=values, layout=layout if whole else "")


def _directory(content: bytes, order: str, big: bool, at: int) -> Tags:
    """Return the tags of one directory; those that the file has, if it is cut off."""
    count = _number(content, order + ("Q" if big else "H"), at)
    if count > _MAX_TAGS:
        raise DataError(f"a TIFF with {count:,} tags in a directory: beyond the limits ({_MAX_TAGS:,})")
    head, step, form, inline = (8, 20, "HHQ", 8) if big else (2, 12, "HHI", 4)
    found: Tags = {}
    for place in range(at + head, min(at + head + count * step, len(content) - step + 1), step):
        tag, kind, values = struct.unpack_from(order + form, content, place)
        size = values * _SIZES.get(kind, 1)
        first = place + step - inline
        if size > inline:
            first = _number(content, order + ("Q" if big else "I"), first)
        if values > _MAX_TAG_VALUES and kind not in (1, 2, 6, 7) and first + size <= len(content):
            raise DataError(f"a TIFF with {values:,} values in tag {tag}: beyond the limits ({_MAX_TAG_VALUES:,})")
        found.setdefault(tag, (kind, values, first))
    return found


def _number(content: bytes, form: str, at: int) -> int:
    """Return an integer; 0 beyond the end of the file."""
    if at < 0 or at + struct.calcsize(form) > len(content):
        return 0
    return int(struct.unpack_from(form, content, at)[0])


# AVIF, HEIC ----------------------------------------------------------------------------------------------------------


def _iso_image(content: bytes) -> str | None:
    """Return AVIF or HEIC by the brands of the file's first box; None if neither."""
    if content[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(content[:4], "big"), 4096)
    brands = {content[8:12], *(content[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIC" if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"} else None
