"""Blocks of decoded pixels: what is not whole is not taken."""

import random
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill import record_file
from potstill.data import decoded_cache
from potstill.data.decoded_cache import PixelFile

KEY = "00000001c0ffee00"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "BLOCK", 500)  # two images of 8 x 8 pixels


def made(folder: Path, images: int = 9) -> tuple[PixelFile, np.ndarray]:
    folder.mkdir(exist_ok=True)
    file = PixelFile(folder, images, (3, 8, 8), KEY)
    pixels = np.random.default_rng(images).integers(0, 256, (images, 3, 8, 8), dtype=np.uint8)
    fill(file, pixels, range(file.blocks))
    return file, pixels


def fill(file: PixelFile, pixels: np.ndarray, blocks: Iterable[int], marked: bool = True) -> None:
    with file.open() as records:
        records.reserve(0, file.blocks)
        checksums = []
        for block in blocks:
            content = pixels[list(file.ids_of(block))].tobytes()
            records.write(block, memoryview(content))
            checksums.append(records.checksum(block, content))
        if marked:
            records.mark(np.array(blocks), np.array(checksums))


def test_bytes_on_disk_are_the_images_one_after_the_other(tmp_path: Path) -> None:
    file, pixels = made(tmp_path)
    assert (file.rows, file.blocks, list(file.ids_of(4))) == (2, 5, [8])
    assert (tmp_path / "pixels.bin").read_bytes() == pixels.tobytes()
    marks = np.frombuffer((tmp_path / "done.bin").read_bytes(), "<u4")
    assert len(marks) == 5
    assert marks[2] == zlib.crc32(pixels[4:6].tobytes(), 1 + 2)  # the key's beginning and the block's number
    found = file.tensor()
    assert found.shape == (9, 3, 8, 8)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(pixels))


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    file, pixels = made(tmp_path)
    found = file.tensor()
    (tmp_path / "pixels.bin").unlink()
    assert torch.equal(found, torch.from_numpy(pixels))


@pytest.mark.parametrize("name", ["pixels.bin", "done.bin"])
def test_each_of_400_changed_bits_is_found_in_its_block(tmp_path: Path, name: str) -> None:
    file, _ = made(tmp_path)
    assert file.intact().all()
    path, chance = tmp_path / name, random.Random(1)
    data = path.read_bytes()
    for _ in range(400):
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
        block = at // 4 if name == "done.bin" else at // 384
        assert file.intact().tolist() == [other != block for other in range(5)], (at, bit)


def test_missing_short_and_strange_files_hold_nothing(tmp_path: Path) -> None:
    file, _ = made(tmp_path)
    pixels, done = ((tmp_path / name).read_bytes() for name in ("pixels.bin", "done.bin"))
    (tmp_path / "pixels.bin").write_bytes(pixels[:-1])
    assert file.intact().tolist() == [True] * 4 + [False]
    (tmp_path / "pixels.bin").write_bytes(pixels)
    (tmp_path / "done.bin").write_bytes(done[:9])
    assert file.intact().tolist() == [True] * 2 + [False] * 3
    (tmp_path / "done.bin").write_bytes(done[4:8] + done[:4] + done[8:])
    assert file.intact().tolist() == [False] * 2 + [True] * 3
    (tmp_path / "done.bin").unlink()
    assert not file.intact().any()
    assert not PixelFile(tmp_path, 9, (3, 8, 8), "00000002c0ffee00").intact().any()
    assert not PixelFile(tmp_path / "nowhere", 9, (3, 8, 8), KEY).intact().any()


def test_the_blocks_of_another_key_do_not_fit(tmp_path: Path) -> None:
    made(tmp_path)
    assert not PixelFile(tmp_path, 9, (3, 8, 8), "00000002c0ffee00").intact().any()


def test_half_a_file_is_filled_up(tmp_path: Path) -> None:
    whole, pixels = made(tmp_path / "whole")
    (tmp_path / "half").mkdir()
    file = PixelFile(tmp_path / "half", 9, (3, 8, 8), KEY)
    fill(file, pixels, [3])
    fill(file, pixels, [1], marked=False)
    assert file.intact().tolist() == [False, False, False, True, False]
    fill(file, pixels, [4, 2, 1, 0])
    assert file.intact().all()
    for name in ("pixels.bin", "done.bin"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.intact().all()


def test_a_file_that_is_too_long_is_cut(tmp_path: Path) -> None:
    file, pixels = made(tmp_path)
    with (tmp_path / "pixels.bin").open("ab") as more:
        more.write(b"more")
    assert file.intact().all()
    assert torch.equal(file.tensor(), torch.from_numpy(pixels))
    with file.open() as records:
        records.reserve(0, file.blocks)
    assert (tmp_path / "pixels.bin").read_bytes() == pixels.tobytes()


def test_pixels_are_synced_before_they_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    synced, written = record_file.os.fsync, record_file.os.pwrite
    monkeypatch.setattr(record_file.os, "fsync", lambda handle: (events.append("sync"), synced(handle))[1])
    monkeypatch.setattr(record_file.os, "pwrite", lambda *a: (events.append(f"write {len(a[1])}"), written(*a))[1])
    made(tmp_path, images=2)
    assert events == ["write 384", "sync", "write 4", "sync", "sync"]  # the last one of the folder
