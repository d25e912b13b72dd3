"""Every kind of ill file is found, with its reason, and none stops the examination."""

import hashlib
import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data import concurrency, image_io, scan
from potstill.data.entries import Finding
from potstill.data.image_io import decode
from potstill.data.scan import ImageScan, check_files, scan_content, scan_file


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A PNG of 50,000 x 50,000 pixels, by its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.fixture
def ill(make_folder, picture, tmp_path: Path) -> Path:
    """A folder with one of each."""
    folder = make_folder({"cat": 3, "dog": 6})
    cat = folder / "cat"
    jpeg = encoded(picture(1, (64, 64)), "JPEG")
    (cat / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (cat / "zero.jpg").touch()
    (cat / "words.jpg").write_text("not an image at all")
    (cat / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (cat / "huge.png").write_bytes(huge_png())
    with (cat / "long.bmp").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    png = bytearray(encoded(picture(2), "PNG"))
    png[60] ^= 0xFF
    (cat / "flip.png").write_bytes(png)
    os.mkfifo(cat / "pipe.png")
    (cat / "gif.png").write_bytes(encoded(picture(3), "GIF"))
    (cat / "noname").write_bytes(encoded(picture(4), "PNG"))
    (cat / "text.txt").write_bytes(encoded(picture(5), "PNG"))
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(cat / "plain.png")
    picture(6, (20, 3)).save(cat / "strip.png")
    return folder


def test_each_ill_file_is_found_and_all_of_them(ill: Path, examined) -> None:
    found = examined(ill)

    assert {kind: set(paths) for kind, paths in found.items()} == {
        "truncated": {"cat/cut.jpg"},
        "empty-file": {"cat/zero.jpg"},
        "no-image": {"cat/words.jpg", "cat/svg.png"},
        "oversize": {"cat/huge.png", "cat/long.bmp"},
        "damaged": {"cat/flip.png"},
        "unreadable": {"cat/pipe.png"},
        "other-format": {"cat/gif.png", "cat/text.txt"},
        "blank": {"cat/plain.png"},
        "tiny": {"cat/strip.png"},
    }
    assert "more than 40 megapixels" in found["oversize"]["cat/huge.png"]
    assert found["oversize"]["cat/long.bmp"] == "more than 64 MiB of file"
    assert found["other-format"]["cat/gif.png"] == "a GIF file whose name ends in .png"
    assert found["tiny"]["cat/strip.png"] == "20 x 3 pixels"
    for paths in found.values():
        for path, reason in paths.items():
            assert reason
            assert str(ill) not in path + reason


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JPG", "JPEG"),
        ("a.jpeg", "JPEG"),
        ("a.tif", "TIFF"),
        ("a.TIFF", "TIFF"),
        ("a.bmp", "BMP"),
        ("a.webp", "WEBP"),
    ],
)
def test_the_usual_endings_are_right(name: str, kind: str, picture, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(encoded(picture(0), kind))
    look = scan_file(tmp_path, name)

    assert isinstance(look, ImageScan)
    assert look.format == kind
    assert scan.format_mismatch(name, look.format) is None


def test_what_is_kept_of_an_image(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000)  # 16 bits
    image.save(tmp_path / "a.png")
    look = scan_file(tmp_path, "a.png")
    content = (tmp_path / "a.png").read_bytes()

    assert isinstance(look, ImageScan)
    assert (look.size, look.format, look.mode) == (len(content), "PNG", "I;16")
    assert (look.width, look.height, look.blank) == (7, 5, False)
    assert look.content == hashlib.sha256(content).digest()
    rgb = decode(tmp_path / "a.png")
    assert look.pixels == hashlib.blake2b(b"5 7 " + rgb.tobytes(), digest_size=16).digest()


def test_equal_bytes_in_another_shape_are_other_pixels(tmp_path: Path) -> None:
    for name, shape in (("wide", (2, 8)), ("high", (8, 2))):
        Image.fromarray(np.arange(16, dtype=np.uint8).reshape(shape)).save(tmp_path / f"{name}.png")

    assert scan_file(tmp_path, "wide.png").pixels != scan_file(tmp_path, "high.png").pixels


def test_a_picture_that_is_turned_by_exif_has_the_upright_pixels(picture, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    picture(0).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright, turned = (scan_file(tmp_path, name) for name in ("upright.png", "turned.png"))

    assert upright.content != turned.content
    assert (upright.pixels, upright.width, upright.height) == (turned.pixels, turned.width, turned.height)


@pytest.mark.parametrize("odd", [(0, 0), (4, 3), (8, 8)])
def test_one_odd_pixel_is_not_blank(odd: tuple[int, int]) -> None:
    pixels = np.full((9, 9, 3), 200, np.uint8)
    assert scan_content(encoded(Image.fromarray(pixels), "PNG"), "a").blank
    pixels[odd][1] = 201
    assert not scan_content(encoded(Image.fromarray(pixels), "PNG"), "a").blank


@pytest.mark.parametrize("by_run", [False, True])
def test_large_images_are_decoded_one_at_a_time(make_folder, monkeypatch: pytest.MonkeyPatch, by_run: bool) -> None:
    folder, names = make_folder({"p": 8}), [f"p/{i}.png" for i in range(8)]
    inside, most = 0, 0
    lock, together = threading.Lock(), threading.Barrier(1)

    def slow(image: Image.Image) -> int:
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        together.wait(60)
        with lock:
            inside -= 1
        return 1

    def look() -> None:
        if by_run:
            check_files(folder, names, "x")
        else:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda name: scan_file(folder, name), names))

    monkeypatch.setattr(image_io, "_orientation", slow)
    monkeypatch.setattr(scan, "_PIECE", 1)
    monkeypatch.setattr(scan, "_SMALL", 0)  # threads for files of any size
    monkeypatch.setattr(concurrency, "thread_count", lambda: 4)
    monkeypatch.setattr(image_io, "MOST_PIXELS", 12 * 10 - 1)
    look()
    assert most == 1
    monkeypatch.setattr(image_io, "MOST_PIXELS", 12 * 10)
    together = threading.Barrier(2)  # each waits until another one is decoded as well
    look()
    assert most > 1


def test_a_file_that_is_gone_or_may_not_be_read(tmp_path: Path) -> None:
    gone = scan_file(tmp_path, "gone.png")
    (tmp_path / "folder.png").mkdir()

    assert gone == Finding("unreadable", "gone.png", "No such file or directory")
    assert scan_file(tmp_path, "folder.png").kind == "unreadable"
    assert scan_file(tmp_path, "n\0l.png").kind == "unreadable"
