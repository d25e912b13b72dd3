"""Against torchvision's functions, image by image."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from potstill.data.augment import adjust_colors, color_jitter
from potstill.data.samplers import CounterRNG, uniform

THEIRS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)


def images(count, side=24, seed=0):
    random = np.random.default_rng(seed)
    level = random.integers(0, 256, (count, 3, 1, 1))  # of every brightness and colour
    return torch.from_numpy((level + random.integers(-90, 90, (count, 3, side, side))).clip(0, 255).astype(np.uint8))


def one_by_one(given, factors, orders):
    found = []
    for image, own, order in zip(given, factors.tolist(), orders.tolist(), strict=True):
        for factor, what in zip(own, order, strict=True):
            image = THEIRS[what](image, factor)
        found.append(image)
    return torch.stack(found)


def factors_for(count, rounds, seed=1):
    return np.random.default_rng(seed).integers(0, 2049, (count, rounds)) / 1024  # 0 to 2


@pytest.mark.parametrize("what", [0, 1, 2], ids=["brightness", "contrast", "saturation"])
def test_each_is_torchvisions(what):
    given, factors = images(300), factors_for(300, 1)
    orders = np.full((300, 1), what)
    found, expected = adjust_colors(given, factors, orders), one_by_one(given, factors, orders)
    difference = (found.int() - expected.int()).abs()
    if what == 0:
        assert torch.equal(found, expected)
    assert difference.max() <= 1  # where torchvision's grey or mean falls just below a whole number
    assert (difference > 0).float().mean() < 1e-3
    assert (found != given).any(dim=3).any(dim=2).any(dim=1).float().mean() > 0.9


def test_the_order_is_each_images_own():
    given, factors = images(300), factors_for(300, 3)
    orders = np.array(list(permutations(range(3))) * 50)
    expected = one_by_one(given, factors, orders)
    difference = (adjust_colors(given, factors, orders).int() - expected.int()).abs()
    assert (difference > 2).float().mean() < 1e-4  # what is one off may grow in the next round
    assert (difference > 0).float().mean() < 3e-3
    swapped = (one_by_one(given, factors, np.roll(orders, 1, axis=0)).int() - expected.int()).abs()
    assert (swapped > 2).float().mean() > 0.3


def test_greys_are_rounded_down_as_if_worked_out_exactly():
    values = np.arange(0, 256, 5)
    red, green, blue = (each.reshape(-1) for each in np.meshgrid(values, values, values, indexing="ij"))
    pixels = torch.from_numpy(np.stack([red, green, blue]).astype(np.uint8))[None, :, None]  # [1, 3, 1, all]
    found = adjust_colors(pixels, np.zeros((1, 1)), np.full((1, 1), 2))  # no saturation at all
    exact = (2989 * red + 5870 * green + 1140 * blue) // 10000
    for channel in range(3):
        assert found[0, channel, 0].tolist() == exact.tolist()


def test_factors_are_drawn_around_one_and_orders_evenly(monkeypatch):
    ids, seen = np.arange(6000), {}

    def see(given, factors, orders):
        seen.update(factors=factors, orders=orders)
        return given

    monkeypatch.setattr("potstill.data.augment.adjust_colors", see)
    color_jitter(images(1).expand(6000, -1, -1, -1), 0.4, CounterRNG(3, ids, 1))
    by_kind = np.take_along_axis(seen["factors"], np.argsort(seen["orders"], axis=1), axis=1)
    for kind, field in enumerate(("brightness", "contrast", "saturation")):
        expected = 0.6 + 0.8 * uniform(3, f"jitter {field}", ids, 1)
        assert np.abs(by_kind[:, kind] - expected).max() <= 2**-11 + 1e-12
    assert (seen["factors"] * 1024 % 1 == 0).all()
    kinds, counts = np.unique(seen["orders"], axis=0, return_counts=True)
    assert sorted(map(tuple, kinds.tolist())) == sorted(permutations(range(3)))
    assert counts.min() > 850  # of a thousand each


def test_batches_of_any_size_and_layout_give_the_same():
    given, factors, orders = images(40, side=60), factors_for(40, 3), np.array(list(permutations(range(3))) * 7)[:40]
    together = adjust_colors(given, factors, orders)
    alone = torch.cat([adjust_colors(given[i : i + 1], factors[i : i + 1], orders[i : i + 1]) for i in range(40)])
    assert torch.equal(together, alone)
    last = given.contiguous(memory_format=torch.channels_last)
    assert torch.equal(adjust_colors(last, factors, orders), together)
    assert torch.equal(given, images(40, side=60))
