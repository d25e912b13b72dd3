"""From a drawing function to a PNG file's bytes or to SVG text that follows the page's colours.

matplotlib is imported on first use (0.4 s) and used through its objects: no pyplot, no display, no global figures.
Margins are measured once, here: matplotlib's own layout engines draw and measure every text several times, which was
half of the time of a report.
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

    ``families``: fonts for letters that the default font lacks.
    """
    with _style(families=families):
        return _png(draw_figure(draw, size), dpi)


def as_svg(draw: DrawFunction, size: tuple[float, float], *, name: str, label: str) -> str:
    """The drawing as an ``<svg>`` element for the page.

    ``name`` makes the ids inside unique in the page; ``label`` says what the picture shows to those who do not see it.
    """
    with _style(name):
        return _svg(draw_figure(draw, size), label)


def as_png_and_svg(
    draw: DrawFunction, size: tuple[float, float], *, name: str, label: str, dpi: int
) -> tuple[bytes, str]:
    """``as_png`` and ``as_svg`` of one drawing."""
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
    """Within the block, matplotlib has the report's settings; ``name``: of what SVG ids are made."""
    import matplotlib as mpl

    kept, log = dict.copy(mpl.rcParams), logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)  # a font that has one weight only is reported each time it is used
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shown as a box; still a picture
        try:
            # As a plain dict: checking 300 settings anew for each picture takes longer than drawing some of them.
            fonts = [DEFAULT_FONT, *families]  # by name: of a generic family matplotlib takes the first font alone
            ours = _settings() | {"svg.hashsalt": name or None, "font.family": fonts}
            dict.update(mpl.rcParams, ours)  # type: ignore[misc]
            yield
        finally:
            dict.update(mpl.rcParams, kept)
            log.setLevel(level)


@cache
def _settings() -> dict[str, Any]:
    """All settings of matplotlib, checked; those of a user (usetex, dark background) must not reach the report."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        ours = dict.copy(matplotlib.rcParams)
    return {key: value for key, value in ours.items() if not key.startswith("backend")}


def draw_figure(draw: DrawFunction, size: tuple[float, float]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    _set_layout(figure, canvas.get_renderer())  # type: ignore[no-untyped-call]
    return figure


def _set_layout(figure: "Figure", renderer: Any) -> None:
    """Give the axes, side by side, all the room that their labels and the figure's legend leave."""
    width, height = figure.bbox.width, figure.bbox.height
    pad = _PADDING * figure.dpi
    below = sum(legend.get_window_extent(renderer).height for legend in figure.legends)
    around = []
    for axes in figure.axes:
        outer, inner = axes.get_tightbbox(renderer, for_layout_only=True), axes.get_window_extent()
        around.append(
            (inner.x0 - outer.x0, inner.y0 - outer.y0, outer.x1 - inner.x1, outer.y1 - inner.y1)
            if outer is not None
            else (0.0, 0.0, 0.0, 0.0)
        )
    low, high = (max(each[side] for each in around) for side in (1, 3))
    room = (width - sum(left + right for left, _, right, _ in around) - pad * (len(around) + 1)) / len(around)
    bottom, top = pad + below + low, height - pad - high
    place = pad
    for axes, (left, _, right, _) in zip(figure.axes, around, strict=True):
        # Long names in a small picture: the axes stay visible, names are cut off at the edge.
        axes.set_position(
            ((place + left) / width, bottom / height, max(room, 0.2 * width) / width, max(top - bottom, pad) / height)
        )
        place += left + room + right + pad


def _clean_svg(svg: bytes, label: str) -> str:
    """Strip what a page does not need (prolog, metadata, fonts, fixed size) and let the page set the colours."""
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
    """Keep the ids of clips and markers, which are hashes of our own; figure_1, axes_1, ... would repeat in a page."""
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
