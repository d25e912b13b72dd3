"""From a drawing function to a PNG file's bytes or to SVG text that follows the page's colours.

matplotlib is imported on first use (0.4 s) and used through its objects: no pyplot, no display, no global figures.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree  # nosec B405 # parses what matplotlib has just drawn

from potstill.report import theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], None]
DPI = 144

_STYLE: dict[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib, so pictures are the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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


def as_png(draw: Draw, size: tuple[float, float]) -> bytes:
    """The drawing, ``size`` inches wide and high, as a PNG file on white."""
    buffer = io.BytesIO()
    with _style():
        _drawn(draw, size).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def as_svg(draw: Draw, size: tuple[float, float], *, name: str, label: str) -> str:
    """The drawing as an ``<svg>`` element for the page.

    ``name`` makes the ids inside unique in the page; ``label`` says what the picture shows to those who do not see it.
    """
    buffer = io.BytesIO()
    with _style({"svg.hashsalt": name}):
        _drawn(draw, size).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), label)


@contextmanager
def _style(more: dict[str, Any] | None = None) -> Iterator[None]:
    import matplotlib.style

    # "default" first: a matplotlibrc of the user (usetex, dark background) must not reach the report.
    with matplotlib.style.context(["default", _STYLE | (more or {})]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shown as a box; still a picture
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # tiny axes; still a picture
        yield


def _drawn(draw: Draw, size: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    return figure


def _for_page(svg: bytes, label: str) -> str:
    """Strip what a page does not need (prolog, metadata, fonts, fixed size) and let the page set the colours."""
    root = ElementTree.fromstring(svg)  # nosec B314 # likewise
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            element.set(key.rpartition("}")[2], _variables(value) if key == "style" else value)
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


def _variables(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;?", "", style)
    for name, (light, _) in theme.CSS.items():
        style = style.replace(light, f"var(--{name})")
    return style
