"""Text on coloured fields can be read in both themes; contrast by WCAG's formula, written out here again."""

import numpy as np
import pytest

from potstill.report import canvas
from potstill.report.canvas import field_colors, luminance, rgb_channels, text_color_on


def contrast(first: float, second: float) -> float:
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


@pytest.mark.parametrize(("colour", "on_white"), [("#767676", 4.54), ("#0000ff", 8.59), ("#ff0000", 4.0)])
def test_luminance_is_that_of_wcag(colour: str, on_white: float) -> None:
    # The ratios are those that public contrast checkers give.
    assert round(contrast(luminance(rgb_channels(colour)), 1.0), 2) == pytest.approx(on_white, abs=0.005)


@pytest.mark.parametrize("raster", [True, False])
@pytest.mark.parametrize("colour", [canvas.RIGHT, canvas.WRONG])
def test_text_has_a_contrast_of_four_and_a_half_on_every_field(colour: str, raster: bool) -> None:
    variables = {light: (light, dark) for light, dark in canvas.CSS_COLORS.values()}
    for strength in np.linspace(0, 1, 201):
        letters = variables[text_color_on(colour, float(strength), raster=raster)]
        for field, letter in zip(field_colors(colour, float(strength), raster=raster), letters, strict=True):
            assert contrast(luminance(field), luminance(rgb_channels(letter))) >= 4.5, strength


def test_fields_are_laid_over_the_paper() -> None:
    light, dark = field_colors(canvas.RIGHT, 0.0, raster=False)
    assert (light, dark) == tuple(rgb_channels(paper) for paper in canvas.CSS_COLORS["paper"])
    light, dark = field_colors(canvas.RIGHT, 1.0, raster=False)
    assert (light, dark) == tuple(rgb_channels(each) for each in canvas.CSS_COLORS["right"])
    _, dark = field_colors(canvas.RIGHT, 1.0, raster=True)
    assert dark == pytest.approx([min(1.0, canvas.DARK_IMAGE_BRIGHTNESS * each) for each in rgb_channels(canvas.RIGHT)])
