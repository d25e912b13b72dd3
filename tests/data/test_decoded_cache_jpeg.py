"""JPEG records of training images: pixels near those of the files, equal with and without the file of records, and only
where raw pixels do not fit."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.data import decoded_cache
from potstill.data.concurrency import file_lock
from potstill.data.decoded_cache import JPEG_RECORDS, DecodeRequest, JpegSquares, choose_cache, decode_all, jpeg_squares
from potstill.data.image_sets import FileSet, Subset, read_square
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.input_spec import InputSpec

from .test_decoded_cache import Heard

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="without preadv, pixels are kept in memory")

SIDE, COUNT = 32, 12
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded_cache, "SMALLEST", 1)
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def images(tmp_path: Path) -> FileSet:
    """Smooth photographs of 96 x 72 pixels, as JPEG and PNG files."""
    root = tmp_path / "images"
    root.mkdir()
    names = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(COUNT)]
    for i, name in enumerate(names):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC).save(root / name)
    return FileSet(root, names, [i % 2 for i in range(COUNT)])


def records_of(images: Any, mode: str = "whole", heard: Heard | None = None, **options: Any) -> JpegSquares:
    given = {"cache_fraction": 0.5, "identity": "id", "progress": heard} | options
    return jpeg_squares(images, SIDE, mode, **given)


def all_squares(squares: JpegSquares) -> np.ndarray:
    return np.stack([read_square(squares, i, SIDE, squares.resize_mode) for i in range(len(squares))])


@pytest.mark.parametrize("mode", ["whole", "crop", "pad", "stretch"])
def test_records_are_near_the_files_and_equal_with_and_without_a_file(images: FileSet, mode: str) -> None:
    stored, alone = records_of(images, mode), records_of(images, mode, identity=None)
    assert stored.records is not None
    assert alone.records is None
    pixels = all_squares(stored)
    assert np.array_equal(pixels, all_squares(alone))
    exact = np.stack([read_square(images, i, SIDE, mode) for i in range(COUNT)]).astype(int)
    assert 0 < np.abs(pixels - exact)[:, :, :SIDE].mean() < 4
    assert np.array_equal(pixels[:, :, SIDE:], exact[:, :, SIDE:])  # the shape of the image, if it is kept
    assert stored.records.nbytes < COUNT * 1200 < exact.size / 2


def test_the_second_start_reads_no_image(images: FileSet, cache: Path) -> None:
    heard = Heard()
    pixels = all_squares(records_of(images, heard=heard))
    (folder,) = cache.iterdir()
    assert heard.notes[0].startswith(f"storing {COUNT} images as JPEG of {SIDE} px, into {folder} (about ")
    assert heard.notes[0].endswith("; 38.0 kB as raw pixels)")
    images.digests = np.zeros((COUNT, 32), np.uint8)  # no file has this digest, but it is part of the key, as before:
    unread = JpegSquares(images, SIDE, "whole", records_of(FileSet(images.root, images.names, images.labels)).records)
    assert np.array_equal(all_squares(unread), pixels)
    assert np.array_equal(all_squares(pickle.loads(pickle.dumps(unread))), pixels)  # as a process that decodes gets it


def test_damaged_and_missing_records_are_made_again(images: FileSet, cache: Path, monkeypatch: Any) -> None:
    pixels = all_squares(records_of(images))
    (folder,) = cache.iterdir()
    content = bytearray((folder / "records.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "records.bin").write_bytes(content)
    made: list[int] = []
    encode = JpegSquares.encode
    monkeypatch.setattr(JpegSquares, "encode", lambda self, i: made.append(i) or encode(self, i))
    assert np.array_equal(all_squares(records_of(images)), pixels)
    assert len(made) == 1
    # A process was killed after some records were marked: the others are written, and the rest stays.
    index = (folder / "index.bin").read_bytes()
    (folder / "index.bin").write_bytes(index[: 16 * 7 + 5])
    made.clear()
    heard = Heard()
    again = records_of(images, heard=heard)
    assert heard.notes[0].endswith(", of which 7 exist already")
    assert sorted(made[COUNT:]) == list(range(7, COUNT))  # after those that were sampled for an estimate
    assert again.records is not None
    assert again.records.exists.all()
    assert np.array_equal(all_squares(again), pixels)


def test_a_small_jpeg_file_is_its_own_record(images: FileSet) -> None:
    small = images.root / "1.jpg"
    Image.open(small).resize((24, 20)).save(small, quality=50)
    large = images.root / "3.jpg"
    Image.open(large).resize((600, 400)).save(large, quality=1)  # few bytes, but long to decode
    squares = records_of(images)
    assert squares.records is not None
    assert squares.records.read(1) == bytes(8) + small.read_bytes()
    assert np.array_equal(squares.square(1), read_square(images, 1, SIDE, "whole"))
    record = squares.records.read(3)
    assert record is not None
    assert record[:8] == np.array([400, 600], "<u4").tobytes()


def test_without_room_the_pixels_are_the_same(images: FileSet, cache: Path, monkeypatch: Any) -> None:
    pixels, heard = all_squares(records_of(images)), Heard()
    shutil.rmtree(cache)
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 4000))
    alone = records_of(images, heard=heard)
    assert alone.records is None
    assert np.array_equal(all_squares(alone), pixels)
    (warning,) = heard.warnings
    assert "is over 50 % of the free space in" in warning
    assert not list(cache.iterdir())


def test_another_process_that_stalls_does_not_stop_the_run(images: FileSet, cache: Path, monkeypatch: Any) -> None:
    pixels, heard = all_squares(records_of(images)), Heard()
    (folder,) = cache.iterdir()
    (folder / "index.bin").write_bytes(b"")
    monkeypatch.setattr(decoded_cache, "_STALLED", 0.2)
    with file_lock(folder / "lock", lambda: None):
        alone = records_of(images, heard=heard)
    assert alone.records is None
    assert "has made no progress" in heard.warnings[0]
    assert np.array_equal(all_squares(alone), pixels)


def test_records_are_chosen_only_where_raw_pixels_do_not_fit(images: FileSet, monkeypatch: Any) -> None:
    room = {"disk": 0, "memory": 0}
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, room["disk"]))
    monkeypatch.setattr(decoded_cache, "free_bytes", lambda device: room["memory"])
    requests = [DecodeRequest(images, side, "whole", "id") for side in (SIDE, 2 * SIDE)]
    raw = sum(each.nbytes for each in requests)

    def choice(disk: int, memory: int, processes: int = 1) -> str:
        room.update(disk=disk, memory=memory)
        kind, note = choose_cache(requests, device=CPU, cache_fraction=0.5, processes=processes)
        assert note.startswith(
            {"raw": "training images are decoded in each", "jpeg": "training images are kept"}[kind][: len(note)]
        )
        return kind if note else f"{kind}, fits"

    assert choice(2 * raw, 0) == "raw, fits"
    assert choice(2 * raw, 0, processes=8) == "raw, fits"  # the file is shared by all of them
    assert choice(0, 2 * raw) == "raw, fits"
    assert choice(2 * raw - 2, 0) == "jpeg"
    assert choice(raw, raw, processes=8) == "jpeg"
    assert choice(2000, 0) == "raw"  # nothing fits
    assert choice(0, raw) == "raw"  # the same: records are kept on disk alone
    room["disk"] = 2 * raw
    for each in requests:
        decode_all(images, each.side, "whole", device=CPU, cache_fraction=0.5, identity="id")
    assert choice(0, 0) == "raw, fits"  # raw pixels are on the disk already


CROPS = AugmentSettings(crop_scale=(0.35, 1), hflip=True)


def test_batches_do_not_depend_on_workers_and_views_are_told_apart(images: FileSet) -> None:
    def loader(**options: Any) -> Loader:
        given = {"batch_size": 5, "augment": CROPS, "order": "shuffled", "seed": 3, "identity": "id"} | options
        return Loader(images, InputSpec(28), **given)

    plain, jpeg = loader(), loader(jpeg=True)
    batches = [batch.images for batch in jpeg.epoch(1)]
    assert not jpeg.resident
    for other in (loader(jpeg=True, workers=2), loader(jpeg=True, identity=None)):
        assert all(map(torch.equal, batches, [batch.images for batch in other.epoch(1)]))
    differences = [(a - b.images).abs().mean().item() for a, b in zip(batches, plain.epoch(1), strict=True)]
    assert all(0 < each < 0.05 for each in differences)  # of values with a standard deviation of 1
    assert jpeg.describe_views() == plain.describe_views() | {"records": JPEG_RECORDS}


def test_folds_share_the_records_of_all_images(images: FileSet, cache: Path) -> None:
    fold = Subset(images, [7, 2, 5], identity="all")
    loaders = [Loader(fold, InputSpec(SIDE), batch_size=3, jpeg=True, workers=workers) for workers in (0, 1)]
    exact = Loader(fold, InputSpec(SIDE), batch_size=3)
    (expected,) = exact.epoch()
    for each in loaders:
        (batch,) = each.epoch()
        assert (batch.images - expected.images).abs().mean() < 0.05
    assert sorted(len(list(each.glob("index.bin"))) for each in cache.iterdir()) == [0, 1]
    (index,) = cache.glob("*/index.bin")
    assert index.stat().st_size == 16 * COUNT


def test_a_teacher_of_a_larger_size_gets_pixels_of_its_own_size(images: FileSet) -> None:
    student, teacher = InputSpec(14), InputSpec(56)
    options: dict[str, Any] = {"batch_size": COUNT, "augment": CROPS, "drawn_for": student, "identity": "id"}
    (exact,), (jpeg,) = (Loader(images, teacher, jpeg=jpeg, **options).epoch() for jpeg in (False, True))
    error = (exact.images - jpeg.images).abs().mean()
    small = torch.nn.functional.interpolate(exact.images, size=14, mode="bilinear", antialias=True)
    enlarged = torch.nn.functional.interpolate(small, size=56, mode="bilinear")
    assert error < 0.05 < (exact.images - enlarged).abs().mean()
