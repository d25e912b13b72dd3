import contextlib
import io
import os
import struct
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data import image_io as module
from potstill.data.image_io import decode, silence_pillow, to_rgb
from potstill.data.preprocessing import resize_to_square
from potstill.errors import DataError

from ..conftest import READ_THOUGH_EXPECTED_TO_FAIL, needs_pillow_13


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@needs_pillow_13
def test_corpus_has_the_expected_outcomes(corpus: Path) -> None:
    wrong, slow = [], []
    lines = (corpus / "MANIFEST.tsv").read_text().splitlines()
    for line in lines:
        name, _, _, _, expected, _, _, size = line.split("\t")
        started = time.process_time()
        try:
            height, width, channels = decode(corpus / name).shape
            outcome = "ok"
            known = (size, "x".join(reversed(size.split("x")))) if size else (f"{width}x{height}",)
            if f"{width}x{height}" not in known or channels != 3:
                wrong.append(f"{name}: {width}x{height}, not {size}")
        except DataError as error:
            outcome = "refused"
            if not str(error).startswith(f"{corpus / name}: ") or "\n" in str(error):
                wrong.append(f"{name}: message {error}")
        if (outcome == "ok") != (expected == "ok") and name not in READ_THOUGH_EXPECTED_TO_FAIL:
            wrong.append(f"{name}: {outcome}, expected {expected}")
        if time.process_time() - started > 5:
            slow.append(name)
    assert lines
    assert not wrong
    assert not slow


@pytest.mark.parametrize("shape", ["Landscape", "Portrait"])
def test_all_exif_orientations_show_the_same_picture(corpus: Path, shape: str) -> None:
    files = {}
    for line in (corpus / "MANIFEST.tsv").read_text().splitlines():
        name, origin, *_ = line.split("\t")
        if f"{shape}_" in origin and origin.endswith(".jpg'"):
            files[origin.split("_")[-1][0]] = corpus / name
    if not files:
        pytest.skip(f"the corpus at {corpus} has no files of the EXIF examples")
    upright = decode(files["1"]).astype(float)
    assert sorted(files) == list("012345678")
    for number in "2345678":
        turned = decode(files[number]).astype(float)
        assert turned.shape == upright.shape
        # Each file carries its number as a picture of its own text: most pixels agree, up to JPEG's loss.
        assert np.abs(turned - upright).mean() < 8, number


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_equals_pillows_own_transposition(kind: str, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(image, kind, exif=exif, **options))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # members of Image.Transpose, by the EXIF standard
    wanted = image if orientation == 1 else image.transpose(Image.Transpose(turn[orientation]))
    np.testing.assert_array_equal(found, np.asarray(wanted))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("factor", [257, 256])
def test_16_bits_equal_8_bits(kind: str, factor: int) -> None:
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16)
    found = decode(encoded(Image.fromarray(gray * factor), kind))
    np.testing.assert_array_equal(found, np.repeat(gray[..., None], 3, axis=2))


def test_big_endian_16_bit_tiff(corpus: Path) -> None:
    little, big = corpus / "0560_pillow_6858245d.tif", corpus / "0561_pillow_6e06ec21.tif"
    if not (little.is_file() and big.is_file()):
        pytest.skip(f"the corpus at {corpus} has not the two TIFF files of this test")
    np.testing.assert_array_equal(decode(little), decode(big))
    with Image.open(little) as image:  # Pillow's own convert("RGB") makes all of it white
        assert (decode(little, (0, 65535))[..., 0] == np.asarray(image) >> 8).all()


def test_12_bit_tiff_uses_its_own_range() -> None:
    image = Image.fromarray(np.array([[0, 16, 4095]], dtype=np.uint16))
    content = bytearray(encoded(image, "TIFF"))
    with Image.open(io.BytesIO(bytes(content))) as opened:
        opened.load()
        assert module._wide_to_rgb(opened)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    ("values", "dtype", "wanted"),
    [
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0, 7, 255], np.float32, [0, 7, 255]),
        ([-3, 256, 65535], np.float32, [0, 1, 255]),
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([-1, 512, 65535], np.int32, [0, 2, 255]),
        ([0, 2**24, 2**31 - 1], np.int32, [0, 2, 255]),
    ],
)
def test_a_single_image_of_wide_values_takes_its_own_range(values: list, dtype: type, wanted: list) -> None:
    found = decode(encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF"))
    assert found[0, :, 0].tolist() == wanted


def tiff(pixels: np.ndarray, *, photometric: int = 1, planes: int = 1) -> bytes:
    """A TIFF of one strip (of one strip a channel if planes is 2) without compression: [H, W] or [C, H, W]."""
    channels, (height, width) = 1 if pixels.ndim == 2 else len(pixels), pixels.shape[-2:]
    stored = pixels if channels == 1 or planes == 2 else pixels.transpose(1, 2, 0)
    data, bits = stored.tobytes(), 8 * pixels.itemsize
    strips = channels if planes == 2 else 1
    values = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * channels), 259: (3, [1]), 262: (3, [photometric]),
        273: (4, [8 + len(data) // strips * i for i in range(strips)]), 277: (3, [channels]), 278: (4, [height]),
        279: (4, [len(data) // strips] * strips), 284: (3, [planes]),
        339: (3, ["uif".index(pixels.dtype.kind) + 1] * channels),
    }  # fmt: skip
    entries, extra = b"", b""
    for tag, (kind, numbers) in values.items():
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers).ljust(4, b"\0")
        if len(packed) > 4:
            place = 8 + len(data) + 2 + 12 * len(values) + 4 + len(extra)
            packed, extra = struct.pack("<I", place), extra + packed
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + packed
    directory = struct.pack("<H", len(values)) + entries + b"\0" * 4 + extra
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_a_tiff_in_which_0_is_white_is_inverted_at_every_depth() -> None:
    gray = np.array([[0, 100, 255]])
    for pixels in (gray.astype(np.uint8), gray.astype(np.uint16) * 257):
        assert decode(tiff(pixels, photometric=0), (0, 65535))[0, :, 0].tolist() == [255, 155, 0]
        assert decode(tiff(pixels), (0, 65535))[0, :, 0].tolist() == [0, 100, 255]


def test_unsigned_32_bit_integers_are_read_as_such() -> None:  # Pillow reads 2**31 and above as negative
    read = module.read_image(tiff(np.array([[0, 2**31, 2**32 - 1]], dtype=np.uint32)), "x")
    assert read.pixels[0, :, 0].tolist() == [0, 128, 255]
    assert read.span == module.ValueSpan("integer", 0.0, 2.0**32 - 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.array([[-1, 0, 1]], dtype=np.int8)), "a TIFF of signed 8-bit integers is not supported"),
        (tiff(np.ones((2, 2), np.float32), photometric=0), "floats in which 0 is white is not supported"),
        (tiff(np.ones((3, 2, 4), np.uint16), photometric=2, planes=2), "in separate planes is not supported"),
        (
            tiff(np.ones((3, 2, 4), np.float32), photometric=2),
            r"3 channels of 32-bit floats, .* is not supported; save",
        ),
        (tiff(np.ones((2, 2))), r"a TIFF of 64-bit floats, .* is not supported; save it as gray"),
    ],
)
def test_a_tiff_that_pillow_does_not_read_or_reads_wrongly_is_refused_by_its_layout(
    content: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        decode(content)


def test_channels_of_8_bits_in_separate_planes_are_read() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    np.testing.assert_array_equal(decode(tiff(pixels, photometric=2, planes=2)), pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_without_a_range_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="pixel"):
        decode(encoded(Image.fromarray(np.array([[0.5, bad]], dtype=np.float32)), "TIFF"))


def test_alpha_is_composited_over_white() -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    found = decode(encoded(Image.fromarray(rgba), "PNG"))
    # 51 / 255 = 1/5: 200/5 + 255*4/5 = 244, 100/5 + 204 = 224, 204
    assert found[0].tolist() == [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    gray = np.array([[[200, 255], [200, 0], [100, 51]]], dtype=np.uint8)
    found = decode(encoded(_la(gray), "PNG"))
    assert found[0, :, 0].tolist() == [200, 255, 224]


def _la(pixels: np.ndarray) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 1])])


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind in ("PNG", "GIF"):
        found = decode(encoded(image, kind, transparency=1))
        assert found[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_transparent_colour_is_white() -> None:
    gray = Image.fromarray(np.array([[5, 9]], dtype=np.uint8))
    assert decode(encoded(gray, "PNG", transparency=9))[0, :, 0].tolist() == [5, 255]
    wide = Image.fromarray(np.array([[1280, 1281]], dtype=np.uint16))
    assert decode(encoded(wide, "PNG", transparency=1281), (0, 65535))[0, :, 0].tolist() == [5, 255]


def test_cmyk_formula() -> None:
    image = Image.new("CMYK", (1, 1), (51, 0, 255, 127))
    # (255 - 51)(255 - 127) / 255 = 102.4, (255)(128) / 255 = 128, 0
    assert decode(encoded(image, "TIFF"))[0, 0].tolist() == [102, 128, 0]


def test_first_frame_of_several() -> None:
    red, blue = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (2, 2), (0, 0, 255))
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        found = decode(encoded(red, kind, save_all=True, append_images=[blue], **options))
        assert found[0, 0].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "JPEG2000", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="formats JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF, HEIC"):
        decode(encoded(Image.new("RGB", (16, 16)), kind))


def test_limits_are_checked_before_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    content = encoded(Image.new("1", (8000, 5001)), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", loaded)
    with pytest.raises(DataError, match="8000 x 5001 pixels are more than 40 megapixels"):
        decode(content)
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    file = tmp_path / "large.png"
    file.write_bytes(bytes(101))
    for source in (file, bytes(101)):
        with pytest.raises(DataError, match="more than 0 MiB of file"):
            decode(source)


def test_a_small_file_takes_no_buffer_of_the_largest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"some bytes")
    tracemalloc.start()
    try:
        assert module.read_file(tmp_path / "a") == b"some bytes"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no /proc")
def test_a_file_that_states_no_bytes_is_read() -> None:
    assert module.read_file("/proc/version") == Path("/proc/version").read_bytes()


def test_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    for name, reason in [
        ("pipe.png", "not a regular file"),
        ("empty.png", "empty file"),
        ("none.png", "No such file"),
        ("nul\0.png", "null"),
    ]:
        with pytest.raises(DataError, match=reason):
            decode(tmp_path / name)
    with pytest.raises(DataError, match=r"directory|not a regular file"):
        decode(tmp_path)


def test_every_exception_of_a_decoder_becomes_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("RGB", (4, 4)), "PNG")
    for error in (ValueError("v"), SyntaxError("s"), IndexError("i"), MemoryError(), RecursionError("r")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", fail)
            with pytest.raises(DataError, match="image: "):
                decode(content)


def test_threads_leave_the_warning_filters_as_they_were(corpus: Path) -> None:
    before = list(warnings.filters)
    names = [line.split("\t")[0] for line in (corpus / "MANIFEST.tsv").read_text().splitlines()][-300:]

    def attempt(name: str) -> None:
        with contextlib.suppress(DataError):
            decode(corpus / name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, names))
    assert list(warnings.filters) == before
    with silence_pillow(), silence_pillow():
        pass
    assert list(warnings.filters) == before


def test_damaged_exif_does_not_cost_the_image() -> None:
    content = encoded(Image.new("RGB", (4, 2), (1, 2, 3)), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(content).shape == (2, 4, 3)


def test_to_rgb_leaves_rgb_alone() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_rgb(Image.fromarray(pixels)), pixels)


def smooth(height: int, width: int) -> Image.Image:
    """Return a picture of waves, as smooth as a photograph of many megapixels."""
    rows, columns = np.mgrid[:height, :width] / 40
    waves = [np.sin(rows + columns), np.cos(2 * rows), np.sin(columns) * np.cos(rows)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "side", "shape"),
    [
        ("JPEG", None, (800, 1200)), ("JPEG", 50, (100, 150)), ("JPEG", 51, (200, 300)), ("JPEG", 224, (800, 1200)),
        ("PNG", 50, (800, 1200)),
    ],
)  # fmt: skip
def test_a_jpeg_is_decoded_at_the_scale_that_its_square_needs(kind: str, side: int | None, shape: tuple) -> None:
    content = encoded(smooth(800, 1200), kind)
    assert decode(content, side=side).shape == (*shape, 3)
    if side is not None:
        reduced, full = (resize_to_square(decode(content, side=each), side, "crop") for each in (side, None))
        assert np.abs(reduced.astype(int) - full).max() <= 4


def test_a_reduced_jpeg_is_upright_and_a_truncated_one_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(smooth(800, 1200), "JPEG", exif=exif)
    assert decode(content, side=50).shape == (150, 100, 3)
    with pytest.raises(DataError, match="truncated"):
        decode(content[: len(content) // 2], side=50)
