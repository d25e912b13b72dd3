"""Preparation as part of a network gives what Pillow gives."""

import numpy as np
import pytest
import torch

from potstill.data.preprocessing import crop_to_input, normalize_array
from potstill.export.preprocessing import Resize, create_preprocessing, dynamic_axes, example_input
from potstill.input_spec import InputSpec

SPECS = (InputSpec(20), InputSpec(20, resize_mode="stretch"), InputSpec(28, crop_share=0.875),
         InputSpec(20, resize_mode="pad"), InputSpec(33, resize_mode="pad"))  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(20, 20), (33, 90), (90, 91), (5, 8), (1, 1), (40, 40)])
def test_the_bytes_are_those_of_pillow(spec: InputSpec, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)

    found = Resize(spec)(torch.from_numpy(pixels)[None])[0].numpy()

    assert np.array_equal(found, crop_to_input(pixels, spec))


def test_tall_images_differ_by_one_at_most() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (300, 41, 3), dtype=np.uint8)

    found = Resize(SPECS[0])(torch.from_numpy(pixels)[None])[0].numpy()

    assert np.abs(found.astype(int) - crop_to_input(pixels, SPECS[0])).max() <= 1


def test_normalising_inside_equals_outside() -> None:
    spec = InputSpec(20, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = np.random.default_rng(3).integers(0, 256, (25, 30, 3), dtype=np.uint8)
    square = crop_to_input(pixels, spec)
    outside = torch.from_numpy(normalize_array(square, spec))

    assert torch.equal(create_preprocessing(spec, "normalise")(torch.from_numpy(square)[None])[0], outside)
    assert torch.equal(create_preprocessing(spec, "resize")(torch.from_numpy(pixels)[None])[0], outside)
    assert len(create_preprocessing(spec, "none")) == 0


def test_what_a_file_takes() -> None:
    shapes = {inside: (example_input(SPECS[0], inside).dtype, sorted(dynamic_axes(inside))) for inside in
              ("none", "normalise", "resize")}  # fmt: skip
    assert shapes == {
        "none": (torch.float32, [0]),
        "normalise": (torch.uint8, [0]),
        "resize": (torch.uint8, [0, 1, 2]),
    }
