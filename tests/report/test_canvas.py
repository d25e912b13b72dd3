import io
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from potstill.report import canvas
from potstill.report.canvas import as_png, as_svg
from potstill.report.diagnostics import draw_cascade
from potstill.report.sweep import draw_trade_off

DRAWS = True
NAMES = ["<script>alert(1)</script>", "$x_1$", "\"'&", "猫", "--> <!--"]


def draw(figure: Figure) -> None:
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], color=canvas.TRAIN)
    axes.set_xticks(range(len(NAMES)), NAMES)


def test_png() -> None:
    data = as_png(draw, (3, 2))
    image = Image.open(io.BytesIO(data))
    assert image.size == (432, 288)
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert data == as_png(draw, (3, 2))


def test_svg_follows_the_page_and_keeps_names_as_text() -> None:
    svg = as_svg(draw, (3, 2), name="x", label='a "label" <b>')
    root = ElementTree.fromstring(svg)
    assert root.attrib == {"viewBox": "0 0 216 144", "role": "img", "aria-label": 'a "label" <b>'}
    assert {text.text for text in root.iter("text")} >= set(NAMES)
    assert not {"script", "style", "metadata", "a"} & {element.tag for element in root.iter()}
    assert "var(--train)" in svg
    assert canvas.TRAIN not in svg
    assert "font-family" not in svg


def cascade(figure: Figure) -> None:
    draw_cascade(figure, [[0, 0.8], [0.2, 0.86], [1, 0.86]], [[0.05, 0.2, 0.86]])


def trade_off(figure: Figure) -> None:
    rows = [
        {"bytes": size, "val": {"value": top1, "low": top1 - 0.02, "high": top1 + 0.02}}
        for size, top1 in ((324e3, 0.985), *((101e3 * 0.85**at, 0.98) for at in range(11)))
    ]
    draw_trade_off(figure, {"reference": rows[0], "candidates": rows[1:], "chosen": 0})


@pytest.mark.parametrize("draw_one", [cascade, trade_off])
def test_no_legend_covers_a_curve(draw_one: Callable[[Figure], None]) -> None:
    figure = canvas.draw_figure(draw_one, (5.2, 3.2))
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_legend() is None
    assert legend.get_window_extent().y1 < axes.get_tightbbox().y0
    assert legend.get_window_extent().y0 >= 0


def test_labels_of_sizes_do_not_overlap() -> None:
    (axes,) = canvas.draw_figure(trade_off, (5.2, 3.2)).axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 4
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_the_users_matplotlib_settings_neither_reach_nor_change() -> None:
    plain = as_png(draw, (3, 2))
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert as_png(draw, (3, 2)) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_pyplot_is_not_imported() -> None:
    code = "import sys; from potstill.report import canvas; canvas.as_png(lambda figure: figure.subplots(), (2, 2))"
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    own = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    subprocess.run([sys.executable, "-c", code], check=True, env=own)


def test_colours_differ_so_that_each_has_its_variable() -> None:
    light = [pair[0] for pair in canvas.CSS_COLORS.values()]
    assert len(set(light)) == len(light)
    assert all(colour == colour.lower() for colour in light)
