import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from potstill.report.canvas import RIGHT, WRONG
from potstill.report.stage_figures import draw_matrix, draw_pair

MATRIX = [[75, 25], [0, 16]]


def test_colours_are_right_or_wrong_and_as_strong_as_the_root_of_the_share() -> None:
    axes = Figure().subplots()
    draw_matrix(axes, MATRIX, ["a", "b"], "shares", "")
    image = np.asarray(axes.images[0].get_array())
    assert image[0, 0] == pytest.approx([*to_rgb(RIGHT), 0.75**0.5])
    assert image[0, 1] == pytest.approx([*to_rgb(WRONG), 0.5])
    assert image[1, 0, 3] == 0
    assert image[1, 1, 3] == 1


def test_counts_and_row_shares_in_the_cells() -> None:
    figure = Figure()
    draw_pair(figure, MATRIX, ["a", "b"], "x")
    cells = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert cells == [["75", "25", "16"], ["75.0 %", "25.0 %", "100 %"]]


def test_small_shares_are_not_rounded_to_nothing() -> None:
    axes = Figure().subplots()
    matrix = np.diag([1000] * 12)
    matrix[0, 1] = 1
    draw_matrix(axes, matrix.tolist(), [str(i) for i in range(12)], "shares", "")
    assert "<1" in [text.get_text() for text in axes.texts]


def test_a_class_without_images() -> None:
    axes = Figure().subplots()
    draw_matrix(axes, [[3, 0], [0, 0]], ["a", "b"], "both", "")
    assert [text.get_text() for text in axes.texts] == ["3\n100 %"]


def test_a_hundred_classes_are_thinned_and_not_annotated() -> None:
    axes = Figure().subplots()
    names = [f"a very long class name, number {i}" for i in range(100)]
    draw_matrix(axes, np.eye(100, dtype=int).tolist(), names, "shares", "")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert not axes.texts
    assert len(labels) == 20
    assert all(len(label) <= 14 for label in labels)
    assert labels[1].endswith("5")
    assert "one class in 5" in axes.get_xlabel()


@pytest.mark.parametrize(("classes", "named"), [(2, 2), (40, 40), (41, 21), (1000, 20)])
def test_how_many_classes_are_named(classes: int, named: int) -> None:
    axes = Figure().subplots()
    draw_matrix(axes, np.eye(classes, dtype=int).tolist(), [str(i) for i in range(classes)], "shares", "")
    assert len(axes.get_xticks()) == named
