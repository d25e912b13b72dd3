"""Text on coloured fields that can be read in the light page and in the dark one."""

from functools import cache

from potstill.report import theme

# (dark letters in the light page, dark letters in the dark page) -> the colour that becomes them
_LETTERS = {
    (True, False): theme.ON_WEAK,
    (True, True): theme.ON_MIDDLE,
    (False, True): theme.ON_STRONG,
    (False, False): theme.ON_DEEP,
}
_EVEN = 0.0525**0.5 - 0.05  # black and white stand out equally where (L + 0.05) / 0.05 = 1.05 / (L + 0.05)


@cache
def text_on(colour: str, strength: float, *, raster: bool = False) -> str:
    """The colour of text on ``colour``, laid over the page's paper with this strength (0 to 1).

    In each theme black or white, whichever stands out more; so the contrast is 4.5 or more on every field.

    Args:
        colour: one of the theme's, its light value.
        strength: opacity, 0 to 1.
        raster: the fields are an image, whose colours the dark page makes brighter by ``theme.BRIGHTER``, rather than
            shapes, which have the theme's dark colour there.
    """
    light, dark = (luminance(each) > _EVEN for each in fields(colour, strength, raster=raster))
    return _LETTERS[light, dark]


def fields(colour: str, strength: float, *, raster: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the eye sees of such a field in the light page and in the dark one: shares of red, green and blue."""
    light, dark = next(pair for pair in theme.CSS.values() if pair[0] == colour)
    bright = tuple(min(1.0, theme.BRIGHTER * each) for each in channels(light)) if raster else channels(dark)
    seen = (channels(light), bright)
    papers = [channels(paper) for paper in theme.CSS["paper"]]
    mixed = [
        tuple(strength * a + (1 - strength) * b for a, b in zip(field, paper, strict=True))
        for field, paper in zip(seen, papers, strict=True)
    ]
    return mixed[0], mixed[1]


def luminance(shares: tuple[float, ...]) -> float:
    """Relative luminance as WCAG 2.2 defines it, 0 (black) to 1 (white)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def channels(colour: str) -> tuple[float, ...]:
    """Shares of red, green and blue of ``#rrggbb``."""
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
