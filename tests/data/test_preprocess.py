import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from potstill.data.preprocess import fit, packed_side, prepare
from potstill.inputs import InputSpec


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_normalisation_by_hand() -> None:
    spec = InputSpec(2, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.25))
    pixels = np.full((2, 2, 3), (255, 51, 102), dtype=np.uint8)
    found = prepare(pixels, spec)
    assert found.shape == (3, 2, 2)
    # (1 - .5) / .5, .2, (.4 - .2) / .25
    assert found[:, 0, 0].tolist() == pytest.approx([1.0, 0.2, 0.8], abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 33), (8, 8), (16, 16)])
def test_crop_is_resize_of_the_shorter_side_and_centre_crop(height: int, width: int) -> None:
    # Crop first, then resize: torchvision's order, resize first, rounds the longer side.
    pixels = noise(height, width)
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    wanted = Image.fromarray(pixels).resize(
        (16, 16), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short)
    )
    found = fit(pixels, 16, "crop")
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(wanted))
    whole = F.resize(torch.from_numpy(pixels).permute(2, 0, 1).float(), [16, 16], antialias=True)
    assert np.abs(fit(pixels, 16, "squash") - whole.numpy()).max() < 1.6


def test_exact_centre_for_a_stripe() -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 200
    assert (fit(pixels, 4, "crop") == 200).all()
    assert fit(pixels, 4, "squash")[0, 0].tolist() != [200] * 4


def test_crop_share_keeps_the_centre() -> None:
    spec = InputSpec(14, crop_share=0.875)
    assert packed_side(spec) == 16
    pixels = noise(16, 16)
    found = prepare(pixels, spec)
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    wanted = (torch.from_numpy(pixels[1:15, 1:15]).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(found, wanted, atol=1e-5)
    assert packed_side(InputSpec(64), random_crops=True) == 73
    assert packed_side(InputSpec(14, fit="squash", crop_share=0.875)) == 14
