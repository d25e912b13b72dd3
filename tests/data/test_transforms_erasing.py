import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from potstill.data.samplers import CounterRNG
from potstill.data.transforms import random_erase


def rectangles(erased):
    """Height and width of the black part of each image [B, 3, S, S], after a look whether it is a rectangle."""
    black = erased == 0
    assert torch.equal(black.all(dim=1), black.any(dim=1))
    rows, columns = black[:, 0].any(dim=2), black[:, 0].any(dim=1)
    assert torch.equal(black[:, 0], rows[:, :, None] & columns[:, None, :])
    return rows.sum(dim=1), columns.sum(dim=1)


def test_rectangles_follow_the_law_of_torchvision():
    count, side = 6000, 48
    white = torch.full((1, 3, side, side), 9, dtype=torch.uint8)
    height, width = rectangles(random_erase(white.expand(count, -1, -1, -1), 1.0, CounterRNG(0, np.arange(count), 0)))
    torch.manual_seed(0)
    peer = v2.RandomErasing(p=1.0)
    theirs = rectangles(torch.cat([peer(white) for _ in range(3000)]))
    for mine, other in zip((height, width), theirs, strict=True):
        assert mine.float().mean().item() == pytest.approx(other.float().mean().item(), rel=0.05)
        assert mine.float().std().item() == pytest.approx(other.float().std().item(), rel=0.06)
    areas = height * width / side**2
    assert areas.min() > 0.015
    assert areas.max() < 0.36


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_as_often_as_asked(probability):
    white = torch.full((3000, 3, 16, 16), 9, dtype=torch.uint8)
    erased = random_erase(white, probability, CounterRNG(0, np.arange(3000), 4))
    share = (erased == 0).any(dim=(1, 2, 3)).float().mean().item()
    assert share == pytest.approx(probability, abs=0.03 if 0 < probability < 1 else 0)
    assert (white == 9).all()


def test_places_are_even():
    erased = random_erase(torch.full((8000, 3, 16, 16), 9, dtype=torch.uint8), 1.0, CounterRNG(1, np.arange(8000), 0))
    often = (erased[:, 0] == 0).float().mean(dim=0)
    assert torch.allclose(often, often.flip(0), atol=0.03)
    assert torch.allclose(often, often.flip(1), atol=0.03)
    assert torch.allclose(often, often.T, atol=0.03)
