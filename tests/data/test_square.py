"""numpy alone prepares images as the loader and prediction with torch do, bit for bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from potstill.data.preprocess import prepare
from potstill.data.square import normalised, squared
from potstill.inputs import InputSpec

SPECS = (
    InputSpec(24),
    InputSpec(24, resize_mode="stretch", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)),
    InputSpec(24, crop_share=0.875),
    InputSpec(24, resize_mode="pad"),
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(24, 24), (50, 31), (7, 90), (1, 1)])
def test_the_same_bits_as_with_torch(spec: InputSpec, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)

    found = normalised(squared(pixels, spec), spec)

    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), prepare(pixels, spec))


def test_by_hand() -> None:
    spec = InputSpec(2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    pixels = np.full((2, 2, 3), 255, np.uint8)

    assert normalised(squared(pixels, spec), spec)[:, 0, 0].tolist() == pytest.approx([2.0, 1.0, 0.5], abs=1e-6)


def test_no_torch_is_imported() -> None:
    code = "import sys, potstill.data.square; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
