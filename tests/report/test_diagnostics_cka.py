from matplotlib.figure import Figure

from potstill.report.diagnostics import draw_similarity, similarity_size

VALUES = [[0.912, None], [-0.034, 1.0]]


def drawn(rows: list[str], columns: list[str]) -> Figure:
    figure = Figure(figsize=similarity_size(len(rows), len(columns)))
    draw_similarity(figure, VALUES, rows, columns, "title")
    return figure


def test_each_field_has_its_number_and_is_as_strong() -> None:
    axes = drawn(["a", "b"], ["c", "d"]).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "0.91",
        (1, 0): "–",
        (0, 1): "\N{MINUS SIGN}0.03",
        (1, 1): "1.00",
    }
    assert [patch.get_alpha() for patch in axes.patches] == [0.912, 0.0, 0.0, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim() == (1.5, -0.5)  # the first row on top


def test_long_paths_are_shortened_and_tilted() -> None:
    axes = drawn(["a", "b"], ["blocks.0.attn.qkv.very.long", "d"]).axes[0]
    label = axes.get_xticklabels()[0]
    assert len(label.get_text()) <= 14
    assert label.get_rotation() == 30


def test_many_stages_get_more_room() -> None:
    assert similarity_size(4, 24)[0] > similarity_size(4, 4)[0]
    assert similarity_size(24, 4)[1] > similarity_size(4, 4)[1]
