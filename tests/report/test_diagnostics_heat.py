import base64
import io

import numpy as np
from PIL import Image

from potstill.report.diagnostics import heatmap_uri


def pixels(rows: list[bytes]) -> np.ndarray:
    head, _, data = heatmap_uri(rows).partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_a_pixel_for_each_field_and_nothing_where_there_is_none() -> None:
    found = pixels([bytes([0, 10, 255]), bytes([0, 0, 128])])
    assert found.shape == (2, 3, 4)
    np.testing.assert_array_equal(found[..., 3] == 0, [[True, False, False], [True, True, False]])


def test_more_is_lighter_on_any_photograph() -> None:
    found = pixels([bytes(range(256))])[0].astype(float)
    opacity = found[:, 3:] / 255
    for photograph in (0.0, 90.0, 160.0):  # beneath its veil a photograph is at most 0.65 * 255 = 166 bright
        seen = found[:, :3] * opacity + photograph * (1 - opacity)
        luminance = seen @ [0.2126, 0.7152, 0.0722]
        assert luminance[255] > luminance[128] > luminance[64] - 1
    assert (np.diff(opacity[:, 0]) >= 0).all()
