import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from potstill.data.preprocessing import decoded_side, resize_to_square
from potstill.data.transforms import preprocess
from potstill.input_spec import InputSpec


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_normalisation_by_hand() -> None:
    spec = InputSpec(2, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.25))
    pixels = np.full((2, 2, 3), (255, 51, 102), dtype=np.uint8)
    found = preprocess(pixels, spec)
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
    found = resize_to_square(pixels, 16, "crop")
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(wanted))
    whole = F.resize(torch.from_numpy(pixels).permute(2, 0, 1).float(), [16, 16], antialias=True)
    assert np.abs(resize_to_square(pixels, 16, "stretch") - whole.numpy()).max() < 1.6


def test_exact_centre_for_a_stripe() -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 200
    assert (resize_to_square(pixels, 4, "crop") == 200).all()
    assert resize_to_square(pixels, 4, "stretch")[0, 0].tolist() != [200] * 4


def test_crop_share_keeps_the_centre() -> None:
    spec = InputSpec(14, crop_share=0.875)
    assert decoded_side(spec) == 16
    pixels = noise(16, 16)
    found = preprocess(pixels, spec)
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    wanted = (torch.from_numpy(pixels[1:15, 1:15]).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(found, wanted, atol=1e-5)
    assert decoded_side(InputSpec(64), random_crops=True) == 73
    assert decoded_side(InputSpec(14, resize_mode="stretch", crop_share=0.875)) == 14


def test_padding_by_hand() -> None:
    # 4 x 8 pixels into 4 x 4: two rows between one black row above and one below.  Of the second pixel 1.75
    # parts are 100 and 0.25 are 200: 112.5.
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4], pixels[:, 4:] = 100, 200
    found = resize_to_square(pixels, 4, "pad")
    assert found[0].tolist() == [[0] * 4, [100, 113, 188, 200], [100, 113, 188, 200], [0] * 4]
    assert resize_to_square(pixels.transpose(1, 0, 2), 4, "pad")[0].T.tolist() == found[0].tolist()


@pytest.mark.parametrize(("height", "width", "side"), [(40, 60, 24), (61, 33, 24), (7, 90, 31), (9, 9, 32)])
def test_padding_is_what_pillow_calls_pad(height: int, width: int, side: int) -> None:
    # ImageOps.pad: resized to fit, centred, black beside it.  It rounds halves to even and the border up.
    pixels = noise(height, width)
    whole = ImageOps.pad(Image.fromarray(pixels), (side, side), Image.Resampling.BILINEAR, color=0)
    found = resize_to_square(pixels, side, "pad").transpose(1, 2, 0)
    inside, wanted = (np.argwhere(each.any(axis=2)) for each in (found, np.asarray(whole)))
    assert np.abs(inside.min(0) - wanted.min(0)).max() <= 1
    if (np.ptp(inside, axis=0) == np.ptp(wanted, axis=0)).all():
        shift = tuple((wanted.min(0) - inside.min(0)).tolist())
        np.testing.assert_array_equal(np.roll(found, shift, (0, 1)), np.asarray(whole))


def test_nothing_of_a_padded_image_is_lost() -> None:
    # The mean over the square, times its area, is that of the image on the same scale.
    pixels = noise(30, 60)
    found = resize_to_square(pixels, 30, "pad").astype(float)
    assert found.mean() * 2 == pytest.approx(pixels.mean(), abs=1.0)
    assert resize_to_square(np.full((1, 300, 3), 9, np.uint8), 16, "pad").any()
