import numpy as np
import pytest
import torch
import torch.nn.functional as F

from potstill.data import AugmentSettings
from potstill.data.augment import ViewTransform
from potstill.data.samplers import uniform

EVERYTHING = {
    "pad_crop": 0.2, "crop_scale": (0.4, 1.0), "hflip": True, "vflip": True, "rotate90": True, "color_jitter": 0.3,
    "auto_augment": "randaugment", "erasing": 0.5,
}  # fmt: skip


def squares(count: int, side: int = 10, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize(("pad_mode", "peer"), [("reflect", "reflect"), ("black", "constant")])
def test_every_single_setting_by_a_slow_reference(pad_mode: str, peer: str) -> None:
    size, shift = 10, 3
    settings = AugmentSettings(pad_crop=0.3, pad_mode=pad_mode, hflip=True, vflip=True, rotate90=True)
    images, ids = squares(40), np.arange(100, 140)
    found = ViewTransform(settings, size=size, seed=5)(images, ids, 7)
    for i, sample in enumerate(ids):
        one = np.array([sample])
        dy, dx = (int(uniform(5, f"shift {axis}", one, 7)[0] * 7) - shift for axis in "yx")
        image = F.pad(images[i : i + 1].float(), (shift,) * 4, mode=peer)[0]
        image = image[:, shift + dy : shift + dy + size, shift + dx : shift + dx + size]
        if uniform(5, "vflip", one, 7)[0] < 0.5:
            image = image.flip(1)
        if uniform(5, "hflip", one, 7)[0] < 0.5:
            image = image.flip(2)
        image = torch.rot90(image, int(uniform(5, "rotate90", one, 7)[0] * 4), (1, 2))
        assert torch.equal(found[i].float(), image), i


def test_shifts_flips_and_turns_are_drawn_evenly() -> None:
    size = 8
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 3, 8, 8)
    ids = np.arange(4000)
    flipped = ViewTransform(AugmentSettings(hflip=True), size=size, seed=0)(ramp, ids, 0)[:, 0, 0, 0]
    assert set(flipped.tolist()) == {0, 7}
    assert 0.46 < (flipped == 7).float().mean() < 0.54
    turned = ViewTransform(AugmentSettings(rotate90=True), size=size, seed=0)(ramp, ids, 0)[:, 0, 0, 0]
    assert {corner: round((turned == corner).float().mean().item(), 1) for corner in (0, 7, 63, 56)} == pytest.approx(
        {0: 0.25, 7: 0.25, 63: 0.25, 56: 0.25}, abs=0.06
    )
    moved = ViewTransform(AugmentSettings(pad_crop=0.25), size=size, seed=0)(ramp, ids, 0)[:, 0, 4, 4].int() - 36
    assert sorted(set(moved.tolist())) == sorted(8 * dy + dx for dy in range(-2, 3) for dx in range(-2, 3))
    counts = np.unique(moved.numpy(), return_counts=True)[1]
    assert counts.min() > 100  # 160 of each expected
    assert counts.max() < 220


def test_a_view_is_a_function_of_seed_sample_and_number_alone() -> None:
    views, images, ids = ViewTransform(AugmentSettings(**EVERYTHING), size=16, seed=1), squares(12, 18), np.arange(12)
    together = views(images, ids, 3)
    order = np.random.default_rng(0).permutation(12)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(views(images[order], ids[order], 3), together[order])
    alone = torch.cat([views(images[i : i + 1], ids[i : i + 1], 3) for i in range(12)])
    assert torch.equal(alone, together)
    mixed = views(images, ids, np.where(ids % 2 == 0, 3, 4))
    assert torch.equal(mixed[::2], together[::2])
    assert not torch.equal(mixed[1::2], together[1::2])
    other_seed = ViewTransform(AugmentSettings(**EVERYTHING), size=16, seed=2)(images, ids, 3)
    same = [(other_seed[i] == together[i]).all().item() for i in range(12)]
    assert sum(same) == 0
    assert sum((views(images, ids + 12, 3)[i] == together[i]).all().item() for i in range(12)) == 0


def test_the_global_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    ViewTransform(AugmentSettings(color_jitter=0.5, auto_augment="trivialaugment"), size=10, seed=0)(
        squares(3), np.arange(3), 0
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_views_are_as_strong_as_asked() -> None:
    jitter = ViewTransform(AugmentSettings(color_jitter=1.0), size=10, seed=0)(squares(60), np.arange(60), 0).float()
    assert jitter.mean(dim=(1, 2, 3)).std() > 10
    erased = ViewTransform(AugmentSettings(erasing=0.5), size=32, seed=0)(
        torch.full((400, 3, 32, 32), 9).byte(), np.arange(400), 0
    )
    black = (erased == 0).float().mean(dim=(1, 2, 3))
    assert 0.42 < (black > 0).float().mean() < 0.58
    assert black[black > 0].min() > 0.015  # areas of 2 to 33 %
    assert black.max() < 0.36


def test_no_augmentation_is_the_centre() -> None:
    images = squares(2, 12)
    assert torch.equal(
        ViewTransform(AugmentSettings(), size=8, seed=0)(images, np.arange(2), 0), images[:, :, 2:10, 2:10]
    )
