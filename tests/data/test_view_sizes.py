"""A view at another size shows the same part of the image with the same changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from potstill.data import AugmentSettings
from potstill.data.augment import AugmentPolicy, ViewTransform
from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.samplers import CounterRNG
from potstill.data.transforms import ViewSize, scale_boxes
from potstill.input_spec import InputSpec

SMALL, LARGE, COUNT = 16, 40, 24
CROP = {"crop_scale": (0.35, 1.0)}


def gradient_images(count: int = COUNT, height: int = 120, width: int = 150) -> ArraySet:
    """Red tells the column, green the row, blue the image: a region shows in a view's colours."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.empty((count, height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 20 + columns * 200 // width, 20 + rows * 200 // height
    pixels[..., 2] = (np.arange(count) * 9 % 200)[:, None, None]
    return ArraySet(pixels, np.arange(count) % 3, [str(i) for i in range(count)])


def spec(size: int, resize_mode: str = "crop") -> InputSpec:
    return InputSpec(size, (0.0,) * 3, (1.0,) * 3, resize_mode)


def loaders(settings: dict, sizes=(SMALL, LARGE), resize_mode="crop", **options) -> tuple[Loader, Loader]:
    images, small = gradient_images(), spec(sizes[0], resize_mode)
    shared = {"batch_size": 8, "augment": AugmentSettings(**settings), "order": "shuffled", "seed": 3, "classes": 3}
    shared |= options
    ours = Loader(images, small, **shared)
    return ours, Loader(images, spec(sizes[1], resize_mode), drawn_for=small, **shared)


def shrunk(images: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean over pixels, in levels of 255; a quarter of a gradient's pixel is about 3 of 200 at 16 px."""
    size = min(ours.shape[-1], theirs.shape[-1])
    return float((shrunk(ours, size) - shrunk(theirs, size)).abs().mean()) * 255


@pytest.mark.parametrize("sizes", [(SMALL, LARGE), (LARGE, SMALL), (21, 34)], ids=["larger", "smaller", "odd"])
@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, 2.0),
        (CROP, 3.0),
        ({"pad_crop": 0.25}, 5.0),
        ({"pad_crop": 0.25, "pad_mode": "black"}, 8.0),
        ({**CROP, "hflip": True}, 3.0),
        ({**CROP, "vflip": True}, 3.0),
        ({**CROP, "rotate90": True}, 3.0),
        ({**CROP, "pad_crop": 0.2, "hflip": True, "vflip": True, "rotate90": True}, 6.0),
        ({"color_jitter": 0.5}, 3.0),
        ({**CROP, "erasing": 1.0}, 8.0),
        ({"mixup": 0.5}, 3.0),
        ({"cutmix": 1.0}, 6.0),
        ({**CROP, "hflip": True, "mixup": 0.5, "cutmix": 1.0}, 6.0),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, dict) else None,
)
def test_both_sizes_show_the_same_view(settings: dict, allowed: float, sizes: tuple[int, int]) -> None:
    ours, theirs = loaders(settings, sizes)
    other = loaders(settings, sizes, seed=4)[1]
    for small, large, foreign in zip(ours.epoch(2), theirs.epoch(2), other.epoch(2), strict=True):
        assert torch.equal(small.index, large.index)
        assert torch.equal(small.labels, large.labels)
        assert small.soft_labels is None or torch.equal(small.soft_labels, large.soft_labels)
        assert large.images.shape[-2:] == (sizes[1], sizes[1])
        assert difference(small.images, large.images) < allowed
        # What is measured can fail: other images, in views of another seed.
        assert difference(small.images, foreign.images) > 2 * allowed


@pytest.mark.parametrize("resize_mode", ["crop", "pad", "stretch"])
def test_every_resize_mode(resize_mode: str) -> None:
    ours, theirs = loaders({**CROP, "hflip": True}, resize_mode=resize_mode)
    for small, large in zip(ours.epoch(), theirs.epoch(), strict=True):
        assert difference(small.images, large.images) < 6


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_policies_apply_the_same_operations_with_the_same_strength(policy: str) -> None:
    """Image by image: operations on histograms and neighbours depend on the size a little, rarely much."""
    ours, theirs = loaders({"auto_augment": policy}, sizes=(40, 80))
    ids, view = torch.arange(COUNT).repeat(8), torch.arange(8).repeat_interleave(COUNT)
    small, large = ours.view(ids, view), shrunk(theirs.view(ids, view), 40)
    apart = 255 * (small - large).abs().mean(dim=(1, 2, 3))
    assert float(apart.median()) < 3
    assert float(apart.quantile(0.95)) < 8


def test_translations_of_a_policy_are_fractions_of_the_size() -> None:
    """Columns that became black: a translation to the right by so many pixels."""
    policy, draws = AugmentPolicy("trivialaugment", space="trivialaugment"), CounterRNG(0, np.arange(400), 0)
    shifts = []
    for size in (90, 30):
        views = policy(torch.full((400, 3, size, size), 200, dtype=torch.uint8), draws, 30)
        black = (views == 0).all(dim=(1, 2))
        others = (views == 200).all(dim=(1, 2))
        shifts.append(
            [int(one.sum()) if bool((one | two).all()) else -1 for one, two in zip(black, others, strict=True)]
        )
    pairs = [(large, small) for large, small in zip(*shifts, strict=True) if small > 0 and large > 0]
    assert len({small for _, small in pairs}) > 3
    assert all(large == 3 * small for large, small in pairs)


def test_second_images_at_another_size() -> None:
    for second in ("strong", "same class"):
        ours, theirs = loaders({**CROP, "hflip": True}, sizes=(40, 80), second=second)
        for small, large in zip(ours.epoch(1), theirs.epoch(1), strict=True):
            apart = 255 * (small.second - shrunk(large.second, 40)).abs().mean(dim=(1, 2, 3))
            assert float(apart.median()) < 3
        index = small.index
        assert torch.equal(theirs.second_view(index, 1), large.second)


def test_pixels_come_from_the_original_and_not_from_the_smaller_view() -> None:
    """Stripes of one pixel vanish at 16 px and are there at 64 px."""
    stripes = np.zeros((4, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    images = ArraySet(stripes, np.arange(4) % 2, list("abcd"))
    ours = Loader(images, spec(16), batch_size=4)
    theirs = Loader(images, spec(64), batch_size=4, drawn_for=spec(16))
    small, large = next(ours.epoch()).images, next(theirs.epoch()).images
    assert float(small[:, :, 2:-2, 2:-2].std()) < 0.05
    assert float(large.std()) > 0.45


def test_equal_sizes_are_the_same_bytes_and_the_same_description() -> None:
    for settings in ({}, {**CROP, "pad_crop": 0.2, "hflip": True, "rotate90": True, "color_jitter": 0.3,
                          "auto_augment": "randaugment", "erasing": 0.5, "cutmix": 1.0}):  # fmt: skip
        ours, theirs = loaders(settings, sizes=(32, 32))
        assert ours.describe_views() == theirs.describe_views()
        for one, two in zip(ours.epoch(1), theirs.epoch(1), strict=True):
            assert torch.equal(one.images, two.images)


def test_another_size_is_another_description() -> None:
    ours, theirs = loaders(CROP)
    alone = Loader(
        gradient_images(), spec(LARGE), batch_size=8, augment=AugmentSettings(**CROP), order="shuffled", seed=3
    )
    described = theirs.describe_views()
    assert described["drawn"] == [18, 16]
    assert described | {"drawn": None} == alone.describe_views() | {"drawn": None}
    assert "drawn" not in alone.describe_views()
    assert "drawn" not in ours.describe_views()


def test_pixels_are_decoded_when_an_epoch_begins() -> None:
    _, theirs = loaders(CROP)
    assert not theirs.resident
    before = theirs.view(torch.arange(8), 0)
    assert not theirs.resident
    next(theirs.epoch())
    assert theirs.resident
    assert torch.equal(theirs.view(torch.arange(8), 0), before)


def test_boxes_keep_their_edges() -> None:
    draws = np.random.default_rng(0)
    top, left = draws.integers(0, 60, (2, 200))
    height, width = draws.integers(1, 14, (2, 200))
    boxes = np.stack([top, left, height, width], axis=1)
    for to in (9, 73, 160, 183):
        found = scale_boxes(boxes, 73, to)
        assert (found[:, 2:] >= 1).all()
        assert (found[:, :2] >= 0).all()
        assert (found[:, :2] + found[:, 2:] <= to).all()
        exact = boxes * to / 73
        wide = exact[:, 2] > 1
        assert np.abs(found[:, 0] - exact[:, 0])[wide].max() <= 0.5
        assert np.abs((found[:, 0] + found[:, 2]) - (exact[:, 0] + exact[:, 2]))[wide].max() <= 0.5


def test_a_view_of_squares_is_drawn_in_other_pixels() -> None:
    squares = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(50, 3, 6, 6)
    large = squares.repeat_interleave(3, -1).repeat_interleave(3, -2)
    ids = np.arange(50)
    settings = AugmentSettings(
        pad_crop=0.34, pad_mode="black", hflip=True, vflip=True, rotate90=True, erasing=0.9, color_jitter=0.5
    )
    small = ViewTransform(settings, size=6, seed=1)(squares, ids, 0)
    found = ViewTransform(settings, size=18, seed=1, drawn=ViewSize(6, 6))(large, ids, 0)
    assert torch.equal(found, small.repeat_interleave(3, -1).repeat_interleave(3, -2))
