"""The table of networks: its rows are those networks, and limits are read as typed."""

import pytest

from potstill.errors import UsageError
from potstill.evaluation.cost import count_flops, count_parameters
from potstill.input_spec import InputSpec
from potstill.models.model_table import (
    REFERENCE,
    SMALL_IMAGE_STUDENTS,
    STUDENTS,
    Limits,
    ModelRow,
    parse_limits,
    read_table,
    write_table,
)
from potstill.models.registry import build_model, own_size


@pytest.fixture(scope="module")
def table():
    return {row.name: row for row in read_table()}


@pytest.mark.parametrize("name", ["cifar/resnet8", "efficientnet-lite0"])
@pytest.mark.parametrize("classes", [10, 23])
def test_a_row_is_what_the_network_has(table, name, classes):
    row, network = table[name], build_model(name, classes, size=own_size(name))
    assert row.size == own_size(name)
    assert row.parameters_with(classes) == count_parameters(network)
    if classes == 10:
        assert row.multiply_adds == count_flops(network, InputSpec(row.size)) // 2


def test_published_counts(table):
    # ResNet-18 has 11,689,512 parameters with 1,000 classes, and EfficientNet-Lite0 4,652,008 (papers and torchvision).
    assert table["efficientnet-lite0"].parameters_with(1000) == 4_652_008
    assert table["torchvision/alexnet"].parameters_with(1000) == 61_100_840


def test_the_students_of_a_search_are_in_the_table_and_timed(table):
    names = [name for families in (STUDENTS, SMALL_IMAGE_STUDENTS) for family in families.values() for name in family]
    assert [name for name in [*names, REFERENCE] if name not in table] == []
    assert [name for name in names if table[name].latency is None] == []
    for families in (STUDENTS, SMALL_IMAGE_STUDENTS):
        for family in families.values():  # from small to large
            sizes = [table[name].multiply_adds for name in family]
            assert sizes == sorted(sizes), family


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [ModelRow("b", 32, 10, 2, 3, 4, None), ModelRow("a", 224, 1_000, 11, 5, 7_000, 0.25)]
    write_table(tmp_path / "table.csv", rows)
    assert read_table(tmp_path / "table.csv") == sorted(rows)


def test_estimates_by_hand():
    row = ModelRow("a", 200, 1_000_000, 101, 10, 10**9, 0.5)
    assert row.file_size() == 4_000_000
    assert row.file_size(20) == 4 * (1_000_000 + 10 * 101)
    assert row.file_size(int8=True) == 1_000_000 + 25_000
    assert row.milliseconds(40.0) == 20.0
    assert row.milliseconds(40.0, 100) == 5.0
    assert row._replace(latency=None).milliseconds(40.0) is None


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("5ms,2MB", Limits(5.0, 2_000_000)),
        ("2mb, .5 ms", Limits(0.5, 2_000_000)),
        ("1s", Limits(1000.0, None)),
        ("250us", Limits(0.25, None)),
        ("1.5MiB", Limits(None, 1_572_864)),
        ("0.1B", Limits(None, 1)),  # 0 would divide by zero
    ],
)
def test_limits_as_typed(text, limits):
    assert parse_limits(text) == limits


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0.1kB", "100B"),
        ("500kB", "500kB"),
        ("5ms, 2MB", "5ms,2MB"),
        ("1234567B", "1.234567MB"),
        ("2GiB", "2.147483648GB"),
        ("90s", "90s"),
        (".00001us", "0.00001us"),
    ],
)
def test_limits_are_shown_in_a_form_that_is_read_back(text, shown):
    assert str(parse_limits(text)) == shown
    assert parse_limits(shown) == parse_limits(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5mz", "unknown unit 'mz'"),
        ("5", "'5' has no unit"),
        ("fast", "is no limit"),
        ("", "is no limit"),
        ("0ms", "above 0"),
        (f"{'9' * 400}MB", "is no limit"),
        ("5ms,6ms", "two limits are times"),
    ],
)
def test_limits_that_make_no_sense(text, says):
    with pytest.raises(UsageError, match=says):
        parse_limits(text)


def test_excess_is_the_largest_ratio():
    limits = Limits(10.0, 100)
    assert limits.excess(5.0, 100) == 1.0
    assert limits.excess(20.0, 100) == 2.0
    assert limits.excess(5.0, 300) == 3.0
    assert limits.excess(None, 1) == float("inf")
    assert Limits().excess(None, 10**9) == 0.0
