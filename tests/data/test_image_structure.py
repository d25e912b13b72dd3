"""Each format's structure, by small files that are made here."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from potstill.data.image_io import decode_bytes
from potstill.data.image_structure import foreign_file_hint, parse_structure
from potstill.errors import DataError

PIXELS = np.random.default_rng(3).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def with_chunks(*chunks: bytes, behind: bytes = b"") -> bytes:
    png = saved("PNG")
    return png[:33] + b"".join(chunks) + png[33:-12] + behind + png[-12:]


@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"tEXt", b"Comment\0hello", crc=1),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"zTXt", b"a\0\0no zlib"),
        chunk(b"zTXt", b"a\0\7" + zlib.compress(b"x")),
        chunk(b"iTXt", b"a\0\1\0\0\0\xff\xff"),
        chunk(b"iTXt", b"a"),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"pHYs", b"short"),
        chunk(b"gAMA", b""),
        chunk(b"sRGB", b"", crc=7),
        chunk(b"acTL", b"\0"),
        chunk(b"juNk", b"\xff" * 70_000),
        b"".join(chunk(b"tEXt", b"a\0" + b"x" * 60_000) for _ in range(1200)),
    ],
    ids=lambda odd: odd[4:8].decode(),
)  # fmt: skip
def test_pngs_with_odd_metadata_keep_their_pixels(odd: bytes) -> None:
    for content in (with_chunks(odd), with_chunks(behind=odd)):
        if len(content) < 64 * 2**20:
            np.testing.assert_array_equal(decode_bytes(content, "odd.png"), PIXELS)


def test_png_with_a_wrong_checksum_of_what_pixels_need_is_refused() -> None:
    png = bytearray(saved("PNG", Image.fromarray(PIXELS[..., 0]).convert("P")))
    at = png.index(b"PLTE") + 4
    png[at] ^= 255
    with pytest.raises(DataError, match="damaged image"):
        decode_bytes(bytes(png), "x.png")


def test_png_with_many_data_chunks_and_text_between_frames() -> None:
    png = saved("PNG")
    at = png.index(b"IDAT") - 4
    length = int.from_bytes(png[at : at + 4], "big")
    data = png[at + 8 : at + 8 + length]
    pieces = b"".join(chunk(b"IDAT", data[i : i + 1]) for i in range(length))
    for flood in (pieces, chunk(b"IDAT", b"") * 1500 + pieces):
        np.testing.assert_array_equal(decode_bytes(png[:at] + flood + png[-12:], "x.png"), PIXELS)
    with pytest.raises(DataError, match=r"truncated|damaged"):
        decode_bytes(png[: at + 8 + length // 2], "x.png")


@pytest.mark.parametrize("key", ["Raw profile type exif", "XML:com.adobe.xmp"])
def test_orientation_in_a_png_text_counts(key: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    raw = exif.tobytes()
    texts = PngImagePlugin.PngInfo()
    if key.startswith("Raw"):
        lines = "\n".join(raw.hex()[i : i + 72] for i in range(0, 2 * len(raw), 72))
        texts.add_text(key, f"\nexif\n{len(raw):8}\n{lines}\n", zip=True)
    else:
        texts.add_itxt(key, '<x tiff:Orientation="3"/>')
    texts.add_text("Software", "elsewhere")
    np.testing.assert_array_equal(decode_bytes(saved("PNG", pnginfo=texts), "x"), PIXELS[::-1, ::-1])


def test_a_long_jpeg_header_costs_neither_pixels_nor_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = saved("JPEG", quality=95)
    turned = saved("JPEG", quality=95, exif=exif)
    segment = b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000)
    wanted = decode_bytes(plain, "x")
    np.testing.assert_array_equal(decode_bytes(plain[:20] + segment * 9 + plain[20:], "x"), wanted)
    at = turned.index(b"\xff\xdb")
    np.testing.assert_array_equal(decode_bytes(turned[:at] + segment * 9 + turned[at:], "x"), wanted[::-1, ::-1])


def test_gif_comments_cost_neither_pixels_nor_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    gif = saved("GIF", image, transparency=1)
    at = gif.index(b"\x21\xf9")
    for place in (at, at + 8):
        noisy = gif[:place] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * 1000 + b"\0" + gif[place:]
        assert decode_bytes(noisy, "x")[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_limits_name_what_is_too_much() -> None:
    jpeg = saved("JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert decode_bytes(jpeg[:-2] + scan * 100 + jpeg[-2:], "x").shape == (12, 20, 3)
    with pytest.raises(DataError, match=r"x: a JPEG of 20 x 12 pixels in 1,0\d\d scans takes too long"):
        decode_bytes(jpeg[:-2] + scan * 1000 + jpeg[-2:], "x")


def test_ordinary_files_reach_the_decoder_as_they_are() -> None:
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"):
        content = saved(kind, progressive=True)
        found = parse_structure(content)
        assert found.content is content
        assert found.format == kind


def test_avif_is_decoded_in_a_process_of_its_own() -> None:
    flat = Image.new("RGB", (32, 20), (200, 60, 10))
    content = saved("AVIF", flat, quality=100, subsampling="4:4:4")
    assert parse_structure(content).isolated
    found = decode_bytes(content, "x.avif")
    assert found.shape == (20, 32, 3)
    assert np.abs(found.astype(int) - (200, 60, 10)).max() <= 2
    with pytest.raises(DataError, match=r"x.avif: damaged image"):
        decode_bytes(content[: len(content) // 2], "x.avif")
    assert decode_bytes(content, "x.avif").shape == (20, 32, 3)  # the process goes on


def test_heic_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.data.image_io.find_spec", lambda name: None)
    heic = struct.pack(">I", 24) + b"ftypmif1" + bytes(4) + b"mif1heic" + bytes(100)
    with pytest.raises(DataError, match=r"IMG.HEIC: a HEIC image; .*potstill\[heif\]"):
        decode_bytes(heic, "IMG.HEIC")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'<?xml version="1.0"?>\n<svg width="4"></svg>', "SVG"),
        (b'{"message": "rate limit exceeded"}', "JSON"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw"),
        (b"II*\0\x10\0\0\0CR\2\0", "raw"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"PK\3\4\x14\0", "zip"),
        (bytes(500), "zero bytes"),
        (bytes(128) + b"DICM" + bytes(8), "DICOM"),
        (b"path,label\na.png,cat\n", "text"),
        (b"\x91\x02\xfe\x81", r"starts with '\\x91\\x02"),
    ],
)
def test_foreign_files_are_named(content: bytes, word: str) -> None:
    with pytest.raises(DataError, match=f"x.jpg: no image of the formats JPEG.*{word}"):
        decode_bytes(content, "x.jpg")
    assert "\n" not in foreign_file_hint(content)


def test_a_raw_file_is_not_taken_for_its_preview() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64, 50706: 0x00000401}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    raw = b"II*\0" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(tags)) + entries + bytes(4)
    with pytest.raises(DataError, match="a camera's raw file"):
        decode_bytes(raw, "x.dng")
