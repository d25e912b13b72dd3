"""numpy alone prepares images as the loader and prediction with torch do, bit for bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from potstill.data.preprocessing import crop_notes, crop_to_input, normalize_array
from potstill.data.transforms import preprocess
from potstill.input_spec import InputSpec

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

    found = normalize_array(crop_to_input(pixels, spec), spec)

    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), preprocess(pixels, spec))


def test_by_hand() -> None:
    spec = InputSpec(2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    pixels = np.full((2, 2, 3), 255, np.uint8)

    assert normalize_array(crop_to_input(pixels, spec), spec)[:, 0, 0].tolist() == pytest.approx(
        [2.0, 1.0, 0.5], abs=1e-6
    )


@pytest.mark.parametrize(
    ("sizes", "how", "words"),
    [
        ([(40, 30)] * 3, "crop", ["cuts off 25 % of the median image; data.resize_mode: pad keeps all of it"]),
        ([(30, 40), (20, 20), (40, 10)], "crop", ["cuts off 25 % of the median image"]),
        ([(40, 30)] * 3, "pad", ["25 % of the median image's square is black border"]),
        ([(40, 30)] * 3, "stretch", ["stretched by 1.33"]),
        ([(20, 20)] * 9 + [(40, 20)], "crop", ["cuts off 50 % of the median one of 1 images that are not square"]),
        ([(20, 20)] * 9 + [(40, 20)], "pad", []),
        ([(20, 20), (31, 31)], "crop", []),
        ([], "crop", []),
    ],
)
def test_how_much_is_not_seen(sizes: list[tuple[int, int]], how: str, words: list[str]) -> None:
    widths, heights = np.array(sizes, np.int64).reshape(-1, 2).T
    found = crop_notes(widths, heights, how)

    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_no_torch_is_imported() -> None:
    code = "import sys, potstill.data.preprocessing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
