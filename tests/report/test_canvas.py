import io
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from potstill.report import canvas
from potstill.report.canvas import as_png, as_svg

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


def test_the_users_matplotlib_settings_neither_reach_nor_change() -> None:
    plain = as_png(draw, (3, 2))
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert as_png(draw, (3, 2)) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_colours_differ_so_that_each_has_its_variable() -> None:
    light = [pair[0] for pair in canvas.CSS_COLORS.values()]
    assert len(set(light)) == len(light)
    assert all(colour == colour.lower() for colour in light)
