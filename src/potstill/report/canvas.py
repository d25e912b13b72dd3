"""Render a drawing function to PNG bytes, or to SVG text in the page's colours.

matplotlib is imported on first use (0.4 s), without pyplot.  Margins are measured once, here: matplotlib's layout
engines measure every text several times, which was half of the time of a report.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree  # nosec B405 # parses what matplotlib has just drawn

from potstill.report import theme
from potstill.report.display_names import DEFAULT_FONT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    "axes.titlecolor": theme.INK,
    "axes.labelcolor": theme.FAINT,
    "axes.edgecolor": theme.FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": theme.GRID,
    "grid.linewidth": 0.8,
    "xtick.color": theme.FAINT,
    "ytick.color": theme.FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": theme.INK,
    "text.parse_math": False,  # a class may be called "$x$"
    "legend.frameon": False,
    "legend.labelcolor": theme.INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": theme.PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}


def as_png(draw: DrawFunction, size: tuple[float, float], *, dpi: int = DPI, families: Sequence[str] = ()) -> bytes:
    """Return the drawing, ``size`` inches wide and high, as a PNG file on white.

    ``families``: further fonts, for letters that the default font lacks.
    """
    with _style(families=families):
        return _png(draw_figure(draw, size), dpi)


def as_svg(draw: DrawFunction, size: tuple[float, float], *, name: str, label: str) -> str:
    """Return the drawing as an ``<svg>`` element for the page.

    ``name`` makes the ids inside unique in the page; ``label`` is the text for screen readers.
    """
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

    original, log = dict.copy(mpl.rcParams), logging.getLogger("matplotlib.font_manager")
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
            dict.update(mpl.rcParams, original)
            log.setLevel(level)


@cache
def _settings() -> dict[str, Any]:
    """Return all settings of matplotlib, so that a user's own (usetex, dark background) do not affect the report."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        settings = dict.copy(matplotlib.rcParams)
    return {key: value for key, value in settings.items() if not key.startswith("backend")}


def draw_figure(draw: DrawFunction, size: tuple[float, float]) -> "Figure":
    """Return a figure of ``size`` inches that ``draw`` has drawn on, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    _set_layout(figure, canvas.get_renderer())  # type: ignore[no-untyped-call]
    return figure


def _set_layout(figure: "Figure", renderer: Any) -> None:
    """Lay out the axes side by side in the space that their labels and the figure's legend leave."""
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
    for name, (light, _) in theme.CSS_COLORS.items():
        style = style.replace(light, f"var(--{name})")
    return style
