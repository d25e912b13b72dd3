"""Colours: Okabe and Ito's colour-blind safe palette, one meaning each, and legible text on them.

Figures are drawn with the light values, which become CSS variables in the page, so that one drawing serves the light
and the dark page.  The values must therefore differ from each other.
"""

from functools import cache

INK = "#1b1f24"
FAINT = "#5b6570"
GRID = "#d9dee4"
PAPER = "#ffffff"

TRAIN, VAL, TEST = "#0072b2", "#d55e00", "#009e73"
TEACHER, BASELINE, DISTILLED = "#cc79a7", "#e69f00", "#0173b3"
ASSISTANT, GENERATION = "#8a5a9e", "#56b4e8"
RIGHT, WRONG = "#0074b4", "#d45d00"
# Text on a coloured field, light page / dark page (see ``text_color_on``): black / white, black / black, ...
ON_WEAK, ON_MIDDLE, ON_STRONG, ON_DEEP = "#000001", "#000002", "#fefefe", "#fefeff"
DARK_IMAGE_BRIGHTNESS = 1.3  # of raster images in the dark page

SPLIT_COLORS = {"train": TRAIN, "val": VAL, "test": TEST}
ROLE_COLORS = {
    "teacher": TEACHER,
    "baseline": BASELINE,
    "assistant": ASSISTANT,
    "generation": GENERATION,
    "distilled": DISTILLED,
}

# CSS variable -> (light, dark)
CSS_COLORS = {
    "ink": (INK, "#e8ebef"),
    "faint": (FAINT, "#a3adb8"),
    "grid": (GRID, "#343b44"),
    "paper": (PAPER, "#14181d"),
    "train": (TRAIN, "#56b4e9"),
    "val": (VAL, "#f08a3c"),
    "test": (TEST, "#2fc796"),
    "teacher": (TEACHER, "#d996bd"),
    "baseline": (BASELINE, "#e8ac28"),
    "distilled": (DISTILLED, "#57b5ea"),
    "assistant": (ASSISTANT, "#b48cc6"),
    "generation": (GENERATION, "#9fd3f2"),
    "right": (RIGHT, "#56b3e8"),
    "wrong": (WRONG, "#f18b3d"),
    "on-weak": (ON_WEAK, "#ffffff"),
    "on-middle": (ON_MIDDLE, "#000000"),
    "on-strong": (ON_STRONG, "#000000"),
    "on-deep": (ON_DEEP, "#ffffff"),
}


def css_variables() -> tuple[str, str]:
    """Return the CSS declarations for the light and the dark page."""
    light = " ".join(f"--{name}: {pair[0]};" for name, pair in CSS_COLORS.items())
    dark = " ".join(f"--{name}: {pair[1]};" for name, pair in CSS_COLORS.items())
    return light, dark


# (dark text in the light page, dark text in the dark page) -> colour
_TEXT_COLORS = {
    (True, False): ON_WEAK,
    (True, True): ON_MIDDLE,
    (False, True): ON_STRONG,
    (False, False): ON_DEEP,
}
_EQUAL_CONTRAST = 0.0525**0.5 - 0.05  # luminance L with (L + 0.05) / 0.05 = 1.05 / (L + 0.05)


@cache
def text_color_on(colour: str, strength: float, *, raster: bool = False) -> str:
    """Return the text colour, black or white in each theme, with the higher contrast (at least 4.5) on a field.

    Args:
        colour: the field's colour, a light value of the theme.
        strength: the field's opacity, 0 to 1.
        raster: whether fields are an image, which the dark page brightens by ``DARK_IMAGE_BRIGHTNESS``, rather than
            shapes, which have the theme's dark colour there.
    """
    light, dark = (luminance(each) > _EQUAL_CONTRAST for each in field_colors(colour, strength, raster=raster))
    return _TEXT_COLORS[light, dark]


def field_colors(colour: str, strength: float, *, raster: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the RGB values (0 to 1) of a field in the light and the dark page."""
    light, dark = next(pair for pair in CSS_COLORS.values() if pair[0] == colour)
    bright = (
        tuple(min(1.0, DARK_IMAGE_BRIGHTNESS * each) for each in rgb_channels(light)) if raster else rgb_channels(dark)
    )
    seen = (rgb_channels(light), bright)
    papers = [rgb_channels(paper) for paper in CSS_COLORS["paper"]]
    mixed = [
        tuple(strength * a + (1 - strength) * b for a, b in zip(field, paper, strict=True))
        for field, paper in zip(seen, papers, strict=True)
    ]
    return mixed[0], mixed[1]


def luminance(shares: tuple[float, ...]) -> float:
    """Return the relative luminance of WCAG 2.2, 0 (black) to 1 (white)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def rgb_channels(colour: str) -> tuple[float, ...]:
    """Return the RGB values (0 to 1) of ``#rrggbb``."""
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
