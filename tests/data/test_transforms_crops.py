import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from potstill.data import transforms
from potstill.data.samplers import CounterRNG
from potstill.data.settings import AugmentSettings
from potstill.data.transforms import (
    CROP_RATIO,
    Boxes,
    SamplingGrid,
    draw_grid,
    resized_crops,
    sample_boxes,
    sample_grid,
)

CPU = torch.device("cpu")


def boxes_of(count: int, side: int, scale: tuple[float, float], *, seed: int = 0, view: int = 0) -> Boxes:
    return sample_boxes(scale, CROP_RATIO, side, CounterRNG(seed, np.arange(count), view), "crop")[0]


def plain(count: int, size: int) -> SamplingGrid:
    return draw_grid(AugmentSettings(), size, CounterRNG(0, np.arange(count), 0), CPU)


def squares(count: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


@pytest.mark.parametrize(("side", "size"), [(73, 64), (37, 32), (64, 64), (40, 96), (256, 64)])
def test_resized_crops_are_torchvisions(side: int, size: int) -> None:
    pixels, boxes = squares(12, side), boxes_of(12, side, (0.05, 1.0), seed=3, view=1)
    found = resized_crops(pixels, boxes, plain(12, size))
    wanted = torch.stack(
        [
            F.resized_crop(image, *box, [size, size], antialias=True)
            for image, box in zip(pixels, boxes.tolist(), strict=True)
        ]
    )
    exact = torch.stack(
        [
            F.resized_crop(image.float(), *box, [size, size], antialias=True)
            for image, box in zip(pixels, boxes.tolist(), strict=True)
        ]
    )
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert (found - exact).abs().max() < 0.65  # half a level of rounding, and a little


def test_shifts_mirrors_and_turns_are_those_of_the_resized_crop() -> None:
    pixels, boxes = squares(60, 37), boxes_of(60, 37, (0.2, 1.0))
    cropped = resized_crops(pixels, boxes, plain(60, 32))
    for mode in ("reflect", "black"):
        augment = AugmentSettings(pad_crop=0.3, pad_mode=mode, hflip=True, vflip=True, rotate90=True)
        places = draw_grid(augment, 32, CounterRNG(1, np.arange(60), 0), CPU)
        assert torch.equal(resized_crops(pixels, boxes, places), sample_grid(cropped, places))


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_what_is_flat_stays_flat(level: int) -> None:  # weights add up to 1 exactly
    pixels = torch.full((40, 3, 73, 73), level, dtype=torch.uint8)
    assert (resized_crops(pixels, boxes_of(40, 73, (0.05, 1.0)), plain(40, 64)) == level).all()


def test_crops_do_not_depend_on_batch_threads_or_layout() -> None:
    pixels, boxes = squares(90, 73), boxes_of(90, 73, (0.3, 1.0))
    together = resized_crops(pixels, boxes, plain(90, 64))
    alone = torch.cat([resized_crops(pixels[i : i + 1], boxes[i : i + 1], plain(1, 64)) for i in range(90)])
    assert torch.equal(together, alone)
    last = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(together, resized_crops(last, boxes, plain(90, 64)))
    threads = torch.get_num_threads()
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(together, resized_crops(pixels, boxes, plain(90, 64)))
    finally:
        torch.set_num_threads(threads)


def test_a_large_images_box_alone_gives_the_same_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, boxes = squares(6, 300), boxes_of(6, 300, (0.05, 1.0))
    augment = AugmentSettings(pad_crop=0.2, hflip=True, vflip=True)
    grid = draw_grid(augment, 224, CounterRNG(0, np.arange(6), 0), CPU)
    alone = resized_crops(pixels, boxes, grid)
    monkeypatch.setattr(transforms, "_MAX_VALUES", pixels.numel())  # all in one slice, whole
    assert torch.equal(alone, resized_crops(pixels, boxes, grid))


def test_boxes_lie_inside_and_follow_the_law_of_torchvision() -> None:
    boxes = boxes_of(20000, 100, (0.35, 1.0))
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 100).all()
    torch.manual_seed(0)
    peer = RandomResizedCrop(10, scale=(0.35, 1.0))
    drawn = [peer.make_params([torch.empty(3, 100, 100)]) for _ in range(4000)]
    for mine, key in ((height, "height"), (width, "width"), (top, "top"), (left, "left")):
        theirs = np.array([params[key] for params in drawn])
        assert abs(mine.mean() - theirs.mean()) < 0.8
        assert abs(mine.std() - theirs.std()) < 0.8
    # where ten attempts fail, the whole square: no box three times as wide as high holds 99.9 % of it
    whole, found = sample_boxes((0.999, 1.0), (3.0, 4.0), 100, CounterRNG(0, np.arange(50), 0), "crop")
    assert not found.any()
    assert (whole == [0, 0, 100, 100]).all()
