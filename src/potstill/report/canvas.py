"""Render a drawing function to PNG bytes, or to SVG text in the page's colours.

matplotlib is imported on first use (0.4 s), without pyplot.  Margins are measured once, here: matplotlib's layout
engines measure every text several times, which was half of the time of a report.

The colours are Okabe and Ito's colour-blind safe palette, one meaning each.  Figures are drawn with the light values,
which become CSS variables in the page, so that one drawing serves the light and the dark page.  The values must
therefore differ from each other.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree  # nosec B405 # parses what matplotlib has just drawn

from potstill.report.display_names import DEFAULT_FONT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
FAINT = "#5b6570"
GRID = "#d9dee4"
PAPER = "#ffffff"

TRAIN, VAL, TEST = "#0072b2", "#d55e00", "#009e73"
TEACHER, BASELINE, DISTILLED = "#cc79a7", "#e69f00", "#0173b3"
ASSISTANT, GENERATION = "#8a5a9e", "#56b4e8"
PREVIOUS = "#6b6b5e"
RIGHT, WRONG = "#0074b4", "#d45d00"
# Text on a coloured field, light page / dark page (see ``text_color_on``): black / white, black / black, ...
ON_WEAK, ON_MIDDLE, ON_STRONG, ON_DEEP = "#000001", "#000002", "#fefefe", "#fefeff"
DARK_IMAGE_BRIGHTNESS = 1.3  # of raster images in the dark page

SPLIT_COLORS = {"train": TRAIN, "val": VAL, "test": TEST}
ROLE_COLORS = {
    "teacher": TEACHER,
    "previous": PREVIOUS,
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
    "previous": (PREVIOUS, "#b5b5a6"),
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

    ``colour`` is a light value of the theme, ``strength`` its opacity.  ``raster`` fields are an image, which the dark
    page brightens by ``DARK_IMAGE_BRIGHTNESS``; shapes have the theme's dark colour there.
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


DrawFunction = Callable[["Figure"], None]
DPI = 144
_PADDING = 0.06  # inches around the axes with their labels

_STYLE: dict[str, Any] = {
    "font.family": [DEFAULT_FONT],  # it comes with matplotlib, so pictures are the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # else each drawing looks for labels above the axes
    "axes.titlecolor": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$x$"
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}


def as_png(draw: DrawFunction, size: tuple[float, float], *, dpi: int = DPI, families: Sequence[str] = ()) -> bytes:
    """Return the drawing, ``size`` inches wide and high, as a PNG file on white; ``families``: further fonts."""
    with _style(families=families):
        return _png(draw_figure(draw, size), dpi)


def as_svg(draw: DrawFunction, size: tuple[float, float], *, name: str, label: str) -> str:
    """Return the drawing as ``<svg>``; ``name`` makes its ids unique in the page, ``label`` is for screen readers."""
    with _style(name):
        return _svg(draw_figure(draw, size), label)


def as_png_and_svg(
    draw: DrawFunction, size: tuple[float, float], *, name: str, label: str, dpi: int
) -> tuple[bytes, str]:
    """Return ``as_png`` and ``as_svg`` of one drawing."""
    with _style(name):
        figure = draw_figure(draw, size)
        return _png(figure, dpi), _svg(figure, label)


def _png(figure: "Figure", dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: "Figure", label: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _clean_svg(buffer.getvalue(), label)


@contextmanager
def _style(name: str = "", families: Sequence[str] = ()) -> Iterator[None]:
    """Within the block, matplotlib has the report's settings; ``name`` seeds the SVG ids."""
    import matplotlib as mpl

    original, log = _copy(mpl.rcParams), logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)  # a font with a single weight is reported at each use
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        try:
            # As a plain dict: validating 300 settings for each picture takes longer than drawing some of them.
            fonts = [DEFAULT_FONT, *families]  # by name: of a generic family matplotlib uses only the first font
            settings = _settings() | {"svg.hashsalt": name or None, "font.family": fonts}
            dict.update(mpl.rcParams, settings)  # type: ignore[misc]
            yield
        finally:
            dict.update(mpl.rcParams, original)  # type: ignore[misc]
            log.setLevel(level)


@cache
def _settings() -> dict[str, Any]:
    """Return all settings of matplotlib, so that a user's own (usetex, dark background) do not affect the report."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        settings = _copy(matplotlib.rcParams)
    return {key: value for key, value in settings.items() if not key.startswith("backend")}


def _copy(settings: Any) -> dict[str, Any]:
    """Return a plain copy: ``dict.copy`` looks "backend" up, which imports pyplot, half a second."""
    return dict(dict.items(settings))


def draw_figure(draw: DrawFunction, size: tuple[float, float]) -> "Figure":
    """Return a figure of ``size`` inches that ``draw`` has drawn on, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    _set_layout(figure, canvas.get_renderer())  # type: ignore[no-untyped-call]
    return figure


def add_legend_below(figure: "Figure", axes: "Axes") -> None:
    """Add a legend below the axes, where it covers no curve; none if no artist has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = len(labels) if len(labels) <= 3 else math.ceil(len(labels) / 2) if len(labels) <= 6 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, handlelength=2.4)


def _set_layout(figure: "Figure", renderer: Any) -> None:
    width, height = figure.bbox.width, figure.bbox.height
    pad = _PADDING * figure.dpi
    below = sum(legend.get_window_extent(renderer).height for legend in figure.legends)
    margins = []
    for axes in figure.axes:
        outer, inner = axes.get_tightbbox(renderer, for_layout_only=True), axes.get_window_extent()
        margins.append(
            (inner.x0 - outer.x0, inner.y0 - outer.y0, outer.x1 - inner.x1, outer.y1 - inner.y1)
            if outer is not None
            else (0.0, 0.0, 0.0, 0.0)
        )
    low, high = (max(each[side] for each in margins) for side in (1, 3))
    inner_width = (width - sum(left + right for left, _, right, _ in margins) - pad * (len(margins) + 1)) / len(margins)
    bottom, top = pad + below + low, height - pad - high
    x = pad
    for axes, (left, _, right, _) in zip(figure.axes, margins, strict=True):
        # With long names in a small picture the axes stay visible and the names are cut off.
        shown_width, shown_height = max(inner_width, 0.2 * width), max(top - bottom, pad)
        axes.set_position(((x + left) / width, bottom / height, shown_width / width, shown_height / height))
        x += left + inner_width + right + pad


def _clean_svg(svg: bytes, label: str) -> str:
    """Remove prolog, metadata, fonts and fixed size, and replace colours by the page's variables."""
    root = ElementTree.fromstring(svg)  # nosec B314 # likewise
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            element.set(key.rpartition("}")[2], _use_css_variables(value) if key == "style" else value)
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                element.remove(child)
    _drop_unused_ids(root)
    width, height = root.get("width", ""), root.get("height", "")
    root.attrib = {"viewBox": root.get("viewBox", f"0 0 {width} {height}"), "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _drop_unused_ids(root: ElementTree.Element) -> None:
    """Keep only referenced ids (hashes of clips and markers); figure_1, axes_1, ... would repeat in a page."""
    values = [value for element in root.iter() for key, value in element.attrib.items() if key != "id"]
    used = {name for value in values for name in re.findall(r"(?:^|url\()#([\w-]+)", value)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _use_css_variables(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;?", "", style)
    for name, (light, _) in CSS_COLORS.items():
        style = style.replace(light, f"var(--{name})")
    return style
