"""Shifts, mirrors and turns by hand; where they are drawn is tested with the views."""

import numpy as np
import pytest
import torch

from potstill.data.transforms import SamplingGrid, apply_fill_and_rotation, sample_grid


def places(rows, columns, **options):
    return SamplingGrid(torch.tensor(rows), torch.tensor(columns), **({"black": None, "transposed": None} | options))


def test_rows_and_columns_are_those_of_the_centre():
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    found = sample_grid(images, places([[0, 1], [1, 1]], [[1, 0], [0, 0]]))
    assert found.shape == (2, 3, 2, 2)
    for image, given in zip(found, images[:, :, 1:3, 1:3], strict=True):
        assert image.dtype == torch.uint8
        assert given.shape == (3, 2, 2)
    assert torch.equal(found[0], images[0, :, 1:3, 1:3].flip(2))
    assert torch.equal(found[1], images[1, :, 2:3, 1:2].expand(3, 2, 2))


def test_black_and_turned():
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(2, 3, 2, 2)
    black = torch.tensor([[[[False, True], [False, False]]]] * 2)
    found = apply_fill_and_rotation(
        image, places([[0, 1]] * 2, [[0, 1]] * 2, black=black, transposed=torch.tensor([False, True]))
    )
    assert found[0, 0].tolist() == [[1, 0], [3, 4]]
    assert found[1, 2].tolist() == [[1, 3], [0, 4]]


def test_images_that_are_a_view_of_others_are_read_right():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8))
    channels_last = pixels.permute(0, 3, 1, 2)
    chosen = places([[5, 4, 0, 1, 2, 3]] * 4, [[0, 0, 1, 2, 3, 5]] * 4)
    assert torch.equal(sample_grid(channels_last, chosen), sample_grid(channels_last.contiguous(), chosen))


@pytest.mark.parametrize("count", [1, 5])
def test_what_came_in_is_left_alone(count):
    images = torch.full((count, 3, 4, 4), 7, dtype=torch.uint8)
    same = [[0, 1, 2, 3]] * count
    sample_grid(images, places(same, same, black=torch.ones(count, 1, 4, 4, dtype=torch.bool)))
    assert (images == 7).all()
