"""Small pictures: what comes out of Pillow again, and how large it is."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from potstill.experiment.examples import encode_thumbnail


def opened(found):
    image = Image.open(io.BytesIO(base64.b64decode(found["data"], validate=True)))
    image.load()
    return image


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(300, 300, (120, 120)), (90, 400, (120, 27)), (64, 64, (64, 64))]
)
def test_photographs_become_small_jpegs(height, width, shown):
    pixels = np.broadcast_to(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, width, 3)).copy()
    found = encode_thumbnail(pixels)
    image = opened(found)
    assert (found["type"], image.format) == ("jpeg", "JPEG")
    assert image.size == (found["width"], found["height"]) == shown
    assert np.asarray(image)[:, :5].mean() < 20 < 230 < np.asarray(image)[:, -5:].mean()


def test_a_few_pixels_stay_exactly_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = encode_thumbnail(pixels)
    assert found["type"] == "png"
    assert (np.asarray(opened(found)) == pixels).all()


def test_noise_stays_light():
    found = encode_thumbnail(np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8))
    assert len(base64.b64decode(found["data"])) <= 9_000
    dense = np.random.default_rng(0).integers(0, 2, (120, 120, 3), dtype=np.uint8) * 255
    assert len(base64.b64decode(encode_thumbnail(dense)["data"])) <= 12_000
