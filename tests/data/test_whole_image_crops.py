"""Random crops are cut from the whole image, and what they show keeps its shape."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from potstill.data import decoded_cache, loader
from potstill.data.image_sets import ArraySet, FileSet, ImageSet
from potstill.data.loader import Loader
from potstill.data.preprocessing import resize_to_square
from potstill.data.samplers import CounterRNG
from potstill.data.settings import AugmentSettings
from potstill.data.transforms import CROP_RATIO, preprocess, sample_boxes
from potstill.input_spec import InputSpec

COUNT = 24
CROP = AugmentSettings(crop_scale=(0.35, 1.0))
SMALL = AugmentSettings(crop_scale=(0.08, 1.0))


def spec(size: int, resize_mode: str = "crop") -> InputSpec:
    return InputSpec(size, (0.0,) * 3, (1.0,) * 3, resize_mode)


def banners(count: int = COUNT, *, tall: bool = False) -> ArraySet:
    """Images of 4:1, gray with a red (class 0) or green (class 1) end at either side: the centre square is gray."""
    pixels = np.full((count, 40, 160, 3), 90, np.uint8)
    for i in range(count):
        pixels[i, :, :30] = pixels[i, :, -30:] = [(250, 0, 0), (0, 250, 0)][i % 2]
    if tall:
        pixels = pixels.transpose(0, 2, 1, 3)
    return ArraySet(np.ascontiguousarray(pixels), np.arange(count) % 2, [str(i) for i in range(count)])


def views(images: ImageSet, augment: AugmentSettings | None, size: int = 32, number: int = 4) -> torch.Tensor:
    made = Loader(images, spec(size), batch_size=8, augment=augment, seed=1)
    return torch.cat([made.view(torch.arange(len(images)), view) for view in range(number)])


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("augment", [CROP, SMALL], ids=["large", "small"])
def test_random_crops_see_the_ends_of_long_images(augment: AugmentSettings, tall: bool) -> None:
    images = banners(tall=tall)
    coloured = (views(images, augment) - 90 / 255).abs().amax(dim=(1, 2, 3)) > 0.3
    assert float(coloured.float().mean()) > 0.4
    # Both ends: the first half of a view, and the last.
    found = views(images, augment)
    line = (found - 90 / 255).abs().amax(dim=(1, 2) if not tall else (1, 3)) > 0.3
    assert bool(line[:, 0].any())
    assert bool(line[:, -1].any())
    label = torch.from_numpy(images.labels).repeat(4)
    red, green = found[:, 0].amax(dim=(1, 2)), found[:, 1].amax(dim=(1, 2))
    assert torch.equal((green > red)[coloured], (label == 1)[coloured])


def test_views_without_random_crops_are_those_of_prediction() -> None:
    images = banners()
    plain = torch.stack([preprocess(images.pixels(i), spec(32)) for i in range(COUNT)])
    for augment in (None, AugmentSettings()):
        assert torch.equal(views(images, augment, number=1), plain)
    assert float((plain - 90 / 255).abs().max()) < 0.01  # the centre square is gray


@pytest.mark.parametrize("shape", [(300, 300), (200, 300), (300, 200), (100, 400)], ids=str)
def test_a_circle_stays_one(shape: tuple[int, int]) -> None:
    """Width / height of a disk in a view follows from the ratio that was drawn for the crop, whatever the image's."""
    height, width = shape
    canvas = Image.new("RGB", (width, height))
    middle, radius = (width / 2, height / 2), 12
    ImageDraw.Draw(canvas).ellipse([middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius],
                                   fill=(255, 255, 255))  # fmt: skip
    images = ArraySet(np.asarray(canvas)[None].repeat(100, 0), np.zeros(100, int), [str(i) for i in range(100)])
    made = Loader(images, spec(128), batch_size=8, augment=SMALL, seed=2)
    disks = made.view(torch.arange(100), 0)[:, 0] > 0.5
    cut = disks[:, [0, -1]].flatten(1).any(1) | disks[:, :, [0, -1]].flatten(1).any(1)
    inside = ~cut & disks.flatten(1).any(1)
    assert int(inside.sum()) > 10
    measured = disks.any(dim=1).sum(dim=1) / disks.any(dim=2).sum(dim=1)
    assert float(measured[inside].log().abs().max()) < np.log(CROP_RATIO[1]) + 0.12  # whatever the image's ratio
    # A crop of ratio r is shown as a square, so that a disk becomes 1 / r.
    boxes, _ = sample_boxes(SMALL.crop_scale, CROP_RATIO, made.side, CounterRNG(2, np.arange(100), 0), "crop",
                            np.full(100, width / height))  # fmt: skip
    drawn = torch.from_numpy(boxes[:, 3] / boxes[:, 2] * width / height)
    apart = (measured * drawn)[inside].log()
    assert float(apart.abs().max()) < 0.12  # a disk of 20 pixels, rounded twice
    assert abs(float(apart.mean())) < 0.02


def test_area_and_ratio_hold_in_the_image_itself() -> None:
    draws, side = CounterRNG(0, np.arange(2000), 0), 1000
    aspects = np.tile([0.5, 1.0, 1.5, 4.0], 500)
    boxes, fits = sample_boxes((0.05, 0.2), CROP_RATIO, side, draws, "crop", aspects)
    assert fits.all()
    _, _, height, width = boxes.T
    assert (boxes[:, :2] + boxes[:, 2:] <= side).all()
    share, ratio = width * height / side**2, width / height * aspects
    assert 0.0495 < share.min() < 0.06
    assert 0.19 < share.max() < 0.2005
    for each in (0.5, 1.0, 1.5, 4.0):
        assert ratio[aspects == each].min() == pytest.approx(0.75, rel=0.03)
        assert ratio[aspects == each].max() == pytest.approx(4 / 3, rel=0.03)


def test_if_nothing_fits_the_largest_box_of_the_ratio_is_placed_at_random() -> None:
    aspects = np.repeat([0.2, 0.9, 1.0, 5.0], 200)
    boxes, fits = sample_boxes((0.999, 1.0), CROP_RATIO, 300, CounterRNG(0, np.arange(800), 0), "crop", aspects)
    top, left, height, width = boxes.T
    tall, near, wide = aspects == 0.2, (aspects == 0.9) | (aspects == 1.0), aspects == 5.0
    assert not fits[tall | wide].any()
    assert {*width[tall]} == {300}
    assert {*height[tall]} == {80}  # 300 of 1,500 / (4 / 3): a box of 300 x 400 in an image of 300 x 1,500
    assert {*height[wide]} == {300}
    assert {*width[wide]} == {80}
    assert top[tall].min() < 10
    assert top[tall].max() > 210
    assert np.abs(np.histogram(left[wide], 4, (0, 220))[0] - 50).max() < 30
    assert {*map(tuple, boxes[near & ~fits].tolist())} == {(0, 0, 300, 300)}


def test_square_images_have_the_same_boxes_as_without_an_aspect() -> None:
    draws = CounterRNG(5, np.arange(500), 3)
    plain = sample_boxes((0.1, 1.0), CROP_RATIO, 73, draws, "crop")
    found = sample_boxes((0.1, 1.0), CROP_RATIO, 73, draws, "crop", np.ones(500))
    np.testing.assert_array_equal(found[0], plain[0])
    np.testing.assert_array_equal(found[1], plain[1])


def jpeg_folder(folder: Path) -> FileSet:
    """Files of many shapes, large enough to be decoded at a reduced scale; sides are no multiples of 8."""
    generator = np.random.default_rng(0)
    names = []
    for i in range(COUNT):
        height, width = generator.integers(90, 400, 2)
        smooth = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        names.append(f"{i}.jpg")
        smooth.save(folder / names[-1], quality=95, exif=exif.tobytes())
    return FileSet(folder, names, np.arange(COUNT) % 2)


def test_the_shape_is_that_of_the_file_at_every_scale(tmp_path: Path) -> None:
    images = jpeg_folder(tmp_path)
    reduced = 0
    for i in range(COUNT):
        full, small = images.read(i), images.read(i, 20)
        assert full.shape == full.pixels.shape[:2] == small.shape
        reduced += small.pixels.shape != full.pixels.shape
    assert reduced > COUNT // 2


def test_a_teacher_of_another_size_sees_the_same_crop(tmp_path: Path) -> None:
    images = jpeg_folder(tmp_path)
    shared = {"batch_size": 8, "augment": SMALL, "order": "shuffled", "seed": 3}
    ours = Loader(images, spec(32), **shared)
    theirs = Loader(images, spec(128), drawn_for=spec(32), **shared)
    for view in range(3):
        small, large = (each.view(torch.arange(COUNT), view) for each in (ours, theirs))
        shrunk = torch.nn.functional.interpolate(large, size=(32, 32), mode="bilinear", antialias=True)
        apart = 255 * (small - shrunk).abs().mean(dim=(1, 2, 3))
        assert float(apart.max()) < 12
        assert float(apart.mean()) < 5
        assert float((small - shrunk.roll(1, 0)).abs().mean()) * 255 > 20  # what is measured can fail


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="without preadv, pixels are kept in memory")
def test_cached_and_live_pixels_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded_cache, "SMALLEST", 1)
    (tmp_path / "images").mkdir()
    shared = {"batch_size": 8, "augment": SMALL, "order": "shuffled", "seed": 3, "second": "strong"}

    def epoch(**options) -> list[torch.Tensor]:
        made = Loader(jpeg_folder(tmp_path / "images"), spec(32), **shared, **options)
        return [pixels for each in made.epoch(1) for pixels in (each.images, each.second)]

    in_memory = epoch()
    on_disk, again = epoch(identity="id"), epoch(identity="id")
    assert len([*(tmp_path / "cache" / "pixels").iterdir()]) == 1
    monkeypatch.setattr(loader, "decode_all", lambda *args, **options: None)
    alone, by_workers = epoch(), epoch(workers=2)
    for other in (on_disk, again, alone, by_workers):
        assert all(torch.equal(one, two) for one, two in zip(in_memory, other, strict=True))


def test_caches_of_centre_squares_are_not_taken_for_whole_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(decoded_cache, "SMALLEST", 1)
    images = jpeg_folder(tmp_path)
    options = {"device": torch.device("cpu"), "cache_fraction": 0.5, "identity": "id"}
    squares = {
        mode: decoded_cache.decode_all(images, 16, mode, **options) for mode in ("crop", "stretch", "pad", "whole")
    }
    assert squares["whole"] is not None
    assert len([*(tmp_path / "pixels").iterdir()]) == 4
    assert torch.equal(squares["whole"][:, :, :16], squares["stretch"])
    described = {
        mode: Loader(images, spec(16, mode), batch_size=8, augment=CROP).describe_views()
        for mode in ("crop", "stretch", "pad")
    }
    assert described["crop"]["crops_of"] == "whole images"
    assert not any("crops_of" in described[mode] for mode in ("stretch", "pad"))
    assert (
        "crops_of" not in Loader(images, spec(16), batch_size=8, augment=AugmentSettings(hflip=True)).describe_views()
    )


@pytest.mark.parametrize("resize_mode", ["pad", "stretch"])
def test_other_resize_modes_are_cropped_as_they_are(resize_mode: str) -> None:
    images = banners()
    made = Loader(images, spec(32, resize_mode), batch_size=8, augment=AugmentSettings(crop_scale=(1.0, 1.0)))
    whole = np.stack([resize_to_square(images.pixels(i), 37, resize_mode) for i in range(COUNT)])
    boxes, fits = sample_boxes((1.0, 1.0), CROP_RATIO, 37, CounterRNG(0, np.arange(COUNT), 0), "crop")
    assert not fits.all()
    for i in np.flatnonzero(~fits):
        assert boxes[i].tolist() == [0, 0, 37, 37]
        apart = made.view(torch.tensor([int(i)]), 0)[0] * 255 - torch.nn.functional.interpolate(
            torch.from_numpy(whole[i][None]).float(), size=(32, 32), mode="bilinear", antialias=True
        )
        assert float(apart.abs().max()) < 1.6
