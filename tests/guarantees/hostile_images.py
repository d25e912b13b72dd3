"""Small image files that ask a decoder for very much: each function gives the bytes of one."""

import io
import re
import struct
import zlib

from PIL import Image

SIDE = 6300  # of an image just below 40 megapixels


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# JPEG ----------------------------------------------------------------------------------------------------------------


def _jpeg(side: int, mode: str = "L", **options: object) -> bytes:
    return _saved(Image.new(mode, (side, side), 128 if mode == "L" else (9, 200, 90)), "JPEG", quality=50, **options)


def _last_scan(jpeg: bytes) -> bytes:
    return jpeg[[each.start() for each in re.finditer(b"\xff\xda", jpeg)][-1] : -2]


def jpeg_scans_large() -> bytes:
    jpeg = _jpeg(SIDE, progressive=True)
    return jpeg[:-2] + _last_scan(jpeg) * 30_000 + jpeg[-2:]


def jpeg_scans_middle() -> bytes:
    jpeg = _jpeg(2000, progressive=True)
    return jpeg[:-2] + _last_scan(jpeg) * 450 + jpeg[-2:]


def jpeg_scans_tiny() -> bytes:
    jpeg = _jpeg(8, progressive=True)
    return jpeg[:-2] + _last_scan(jpeg) * 2_000_000 + jpeg[-2:]


def jpeg_progressive_full_colour() -> bytes:
    return _jpeg(SIDE, "RGB", progressive=True, subsampling=0)


def jpeg_progressive_cmyk() -> bytes:
    return _saved(Image.new("CMYK", (SIDE, SIDE), (9, 8, 7, 6)), "JPEG", progressive=True)


def jpeg_baseline_full_colour() -> bytes:
    return _jpeg(SIDE, "RGB", subsampling=0)


def jpeg_comments() -> bytes:
    jpeg = _jpeg(16)
    return jpeg[:2] + b"\xff\xfe\0\2" * 4_000_000 + jpeg[2:]


def jpeg_junk() -> bytes:
    jpeg = _jpeg(16)
    return jpeg[:20] + bytes(16_000_000) + jpeg[20:]


def jpeg_fill_bytes() -> bytes:
    jpeg = _jpeg(16)
    return jpeg[:20] + b"\xff" * 60_000_000 + jpeg[20:]


def jpeg_restart_markers() -> bytes:
    jpeg = _jpeg(16)
    return jpeg[:20] + b"\xff\xd0" * 8_000_000 + jpeg[20:]


def jpeg_comments_between_scans() -> bytes:
    jpeg = _jpeg(64, progressive=True)
    at = jpeg.rindex(b"\xff\xda")
    return jpeg[:at] + b"\xff\xfe\0\2" * 14_000_000 + jpeg[at:]


def jpeg_tables_between_scans() -> bytes:
    jpeg = _jpeg(64, progressive=True)
    at = jpeg.rindex(b"\xff\xda")
    start = jpeg.index(b"\xff\xc4")
    table = jpeg[start : start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")]
    return jpeg[:at] + table * (50_000_000 // len(table)) + jpeg[at:]


def jpeg_exif_segments() -> bytes:
    jpeg = _jpeg(16)
    entries = b"".join(struct.pack("<HHII", 0x9000 + i % 4000, 4, 15_000, 8) for i in range(5400))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5400) + entries
    first = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    more = b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + bytes(60_000)
    return jpeg[:2] + first + more * 900 + jpeg[2:]


# PNG -----------------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(
    width: int = 8, height: int = 8, bits: int = 8, colour: int = 2, *, before: bytes = b"", after: bytes = b"",
    data: bytes | None = None, interlace: int = 0,
) -> bytes:  # fmt: skip
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = 1 + (width * channels * bits + 7) // 8
    if data is None:
        packer = zlib.compressobj(1)
        zeros = bytes(2**20)
        whole, rest = divmod(row * height, len(zeros))
        data = b"".join([packer.compress(zeros) for _ in range(whole)]) + packer.compress(bytes(rest)) + packer.flush()
        data = _chunk(b"IDAT", data)
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + head + before + data + after + _chunk(b"IEND", b"")


def png_text_chunks() -> bytes:
    return _png(before=_chunk(b"tEXt", b"a\0b") * 4_000_000)


def png_unknown_chunks_behind() -> bytes:
    return _png(after=_chunk(b"ruNk", b"") * 5_000_000)


def png_tiny_data_chunks() -> bytes:
    data = zlib.compress(bytes(8 * 25), 0)
    pieces = b"".join(_chunk(b"IDAT", data[i : i + 1]) for i in range(len(data)))
    return _png(data=_chunk(b"IDAT", b"") * 4_000_000 + pieces)


def png_compressed_texts() -> bytes:
    bomb = zlib.compress(bytes(500_000), 9)
    return _png(before=b"".join(_chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb) for _ in range(60_000)))


def png_compressed_profile() -> bytes:
    return _png(before=_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(400_000_000), 1)))


def png_one_column() -> bytes:
    return _png(1, 40_000_000, 8, 0)


def png_one_row_of_16_bits() -> bytes:
    return _png(40_000_000, 1, 16, 6)


def png_16_bits_and_alpha() -> bytes:
    return _png(SIDE, SIDE, 16, 6)


def png_16_bit_gray() -> bytes:
    return _png(SIDE, SIDE, 16, 0)


def png_interlaced() -> bytes:
    """Each of the seven passes begins its rows anew."""
    row = 1 + 4 * SIDE
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(row)) for _ in range(2 * SIDE)) + packer.flush()
    return _png(SIDE, SIDE, 8, 6, interlace=1, data=_chunk(b"IDAT", data))


def png_frames() -> bytes:
    frame = _chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 1, 0, 0))
    return _png(before=_chunk(b"acTL", struct.pack(">II", 1_000_000, 0)) + frame * 1_000_000)


# GIF -----------------------------------------------------------------------------------------------------------------


def _gif(before: bytes = b"", canvas: tuple[int, int] = (8, 8), frame: tuple[int, int] = (8, 8)) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    return head + before + b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0\x3b"


def gif_comment() -> bytes:
    return _gif(b"\x21\xfe" + (b"\xff" + b"x" * 255) * 200_000 + b"\0")


def gif_many_comments() -> bytes:
    return _gif(b"\x21\xfe\x01x\0" * 10_000_000)


def gif_junk() -> bytes:
    return _gif(bytes(40_000_000))


def gif_canvas() -> bytes:
    return _gif(canvas=(65535, 65535))


def gif_frame() -> bytes:
    return _gif(frame=(13_000, 13_000))


def gif_interlaced() -> bytes:
    return _saved(Image.new("P", (SIDE, SIDE)), "GIF", interlace=1)


# TIFF ----------------------------------------------------------------------------------------------------------------


def _tiff(tags: dict[int, tuple[int, int, int | bytes]], data: bytes = b"") -> bytes:
    """Little-endian; values as bytes stand behind the directory, ``data`` at byte 8."""
    at = 8 + len(data) + len(data) % 2
    count = len(tags)
    behind = at + 2 + 12 * count + 4
    entries, values = b"", b""
    for tag, (kind, number, value) in sorted(tags.items()):
        if isinstance(value, bytes):
            entries += struct.pack("<HHII", tag, kind, number, behind + len(values))
            values += value
        else:
            entries += struct.pack("<HHII", tag, kind, number, value)
    body = b"II*\0" + struct.pack("<I", at) + data + b"\0" * (len(data) % 2)
    return body + struct.pack("<H", count) + entries + bytes(4) + values


def _gray(width: int, height: int, compression: int = 8, bits: int = 8) -> dict[int, tuple[int, int, int | bytes]]:
    return {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, bits), 259: (3, 1, compression), 262: (3, 1, 1),
            277: (3, 1, 1)}  # fmt: skip


def tiff_tile() -> bytes:
    data = zlib.compress(bytes(2**20))
    return _tiff(
        _gray(16, 16) | {322: (4, 1, 40_000), 323: (4, 1, 40_000), 324: (4, 1, 8), 325: (4, 1, len(data))}, data
    )


def tiff_strip() -> bytes:
    data = zlib.compress(bytes(2**20))
    tags = _gray(SIDE, SIDE, bits=32) | {339: (3, 1, 3), 273: (4, 1, 8), 278: (4, 1, 2**32 - 1), 279: (4, 1, len(data))}
    return _tiff(tags, data)


def tiff_many_strips() -> bytes:
    data = zlib.compress(bytes(8))
    count = 4_000_000
    offsets, sizes = struct.pack("<I", 8) * count, struct.pack("<H", len(data)) * count
    tags = _gray(8, count) | {273: (4, count, offsets), 278: (4, 1, 1), 279: (3, count, sizes)}
    return _tiff(tags, data)


def tiff_many_raw_tiles() -> bytes:
    count = 2_000_000
    offsets, sizes = struct.pack("<I", 8) * count, struct.pack("<I", 1) * count
    tags = _gray(1000, 2000, 1) | {322: (4, 1, 1), 323: (4, 1, 1), 324: (4, count, offsets), 325: (4, count, sizes)}
    return _tiff(tags, bytes(16))


def tiff_unknown_tags() -> bytes:
    data = zlib.compress(bytes(64))
    tags = _gray(8, 8) | {273: (4, 1, 8), 278: (4, 1, 8), 279: (4, 1, len(data))}
    return _tiff(
        tags | dict.fromkeys(range(1000, 32000), (3, 1, 0)) | dict.fromkeys(range(51000, 65000), (3, 1, 0)), data
    )


def tiff_many_values() -> bytes:
    data = zlib.compress(bytes(64))
    tags = _gray(8, 8) | {273: (4, 1, 8), 278: (4, 1, 8), 279: (4, 1, len(data))}
    return _tiff(tags | {258: (3, 20_000_000, b"\x08\0" * 20_000_000)}, data)


def tiff_big_directory() -> bytes:
    count = 3_000_000
    entries = b"".join(struct.pack("<HHQQ", 40_000 + i, 3, 1, 0) for i in range(1000)) * (count // 1000)
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, count) + entries + bytes(8)


def tiff_big_exif() -> bytes:
    count = 2_000_000
    entries = struct.pack("<HHQQ", 40_000, 3, 1, 0) * count
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 8, 279: 64, 34665: 8 + 16 + 80 + 20 * 10 + 16}
    own = b"".join(struct.pack("<HHQQ", tag, 4 if tag < 34665 else 16, 1, value) for tag, value in tags.items())
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16 + 80) + bytes(80) + struct.pack("<Q", len(tags)) + own + bytes(8)
    at = len(head)
    head = head.replace(struct.pack("<Q", tags[34665]), struct.pack("<Q", at))
    return head + struct.pack("<Q", count) + entries


def tiff_jpeg_scans() -> bytes:
    jpeg = _jpeg(4000, progressive=True)
    jpeg = jpeg[:-2] + _last_scan(jpeg) * 5_000 + jpeg[-2:]
    tags = _gray(4000, 4000, 7) | {273: (4, 1, 8), 278: (4, 1, 4000), 279: (4, 1, len(jpeg))}
    return _tiff(tags, jpeg)


def tiff_jpeg_strips() -> bytes:
    jpeg = _saved(Image.new("L", (2000, 16)), "JPEG", progressive=True)
    jpeg = jpeg[:-2] + _last_scan(jpeg) * 80 + jpeg[-2:]
    count = 1250
    offsets, sizes = struct.pack("<I", 8) * count, struct.pack("<I", len(jpeg)) * count
    tags = _gray(2000, 20_000, 7) | {273: (4, count, offsets), 278: (4, 1, 16), 279: (4, count, sizes)}
    return _tiff(tags, jpeg)


def tiff_floats() -> bytes:
    return _saved(Image.new("F", (SIDE, SIDE), 0.5), "TIFF", compression="tiff_adobe_deflate")


def tiff_16_bits() -> bytes:
    return _saved(Image.new("I;16", (SIDE, SIDE), 5000), "TIFF", compression="tiff_adobe_deflate")


def tiff_lzma_dictionary() -> bytes:
    import lzma

    filters = [
        {"id": lzma.FILTER_LZMA2, "dict_size": 1536 * 2**20, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "preset": 0}
    ]
    small = lzma.compress(bytes(64), format=lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    del filters
    at = small.index(b"\x21\x01")  # filter id and size of its properties; the dictionary's size follows
    header = bytearray(small[12 : 12 + 4 * (small[12] + 1)])
    header[at - 12 + 2] = 37  # 2**30 * 1.5
    header[-4:] = struct.pack("<I", zlib.crc32(bytes(header[:-4])))
    data = small[:12] + bytes(header) + small[12 + len(header) :]
    tags = _gray(8, 8, 34925) | {273: (4, 1, 8), 278: (4, 1, 8), 279: (4, 1, len(data))}
    return _tiff(tags, data)


# BMP -----------------------------------------------------------------------------------------------------------------


def _bmp(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    palette = bytes(4 * 2**bits)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + 40 + len(palette) + len(data), 0, 0, 54 + len(palette))
        + head
        + palette
        + data
    )


def bmp_idle_run_lengths() -> bytes:
    return _bmp(8, 8, 8, 1, b"\x08\0" + b"\x08\0" * 30_000_000)


def bmp_single_pixels() -> bytes:
    return _bmp(SIDE, SIDE, 4, 2, b"\x01\x10" * 30_000_000)


def bmp_moves() -> bytes:
    return _bmp(SIDE, SIDE, 8, 1, b"\0\2\1\0" * 15_000_000)


def bmp_line_ends() -> bytes:
    return _bmp(SIDE, SIDE, 8, 1, (b"\x01\0\0\0") * SIDE)


# WebP, AVIF ----------------------------------------------------------------------------------------------------------


def webp_lossless() -> bytes:
    return _saved(Image.new("RGB", (SIDE, SIDE)), "WEBP", lossless=True, quality=0, method=0)


def webp_canvas() -> bytes:
    webp = bytearray(_saved(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", exif=b"Exif\0\0" + bytes(8)))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    return bytes(webp)


def webp_frames() -> bytes:
    frames = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(200)]
    return _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:] * 40)


def avif_large() -> bytes:
    return _saved(Image.new("RGB", (SIDE, SIDE)), "AVIF", speed=10, quality=1)


def avif_lying_size() -> bytes:
    avif = bytearray(_saved(Image.new("RGB", (SIDE, SIDE)), "AVIF", speed=10, quality=1))
    for each in re.finditer(b"ispe", bytes(avif)):
        avif[each.end() + 4 : each.end() + 12] = struct.pack(">II", 16, 16)
    return bytes(avif)


FILES = {
    name: made
    for name, made in globals().items()
    if name.split("_")[0] in ("jpeg", "png", "gif", "tiff", "bmp", "webp", "avif") and callable(made)
}
