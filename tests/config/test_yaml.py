import math
import re
from pathlib import Path

import pytest
import yaml

import potstill
from potstill.config.yaml import dump_yaml, parse_yaml
from potstill.errors import UsageError


def test_every_key_knows_its_line_and_column() -> None:
    document = parse_yaml("a: 1\nb:\n  c: [1, 2]\n  d: {e: 3}\n", "r.yaml")

    assert document.value == {"a": 1, "b": {"c": [1, 2], "d": {"e": 3}}}
    assert document.locations.find(("a",)) == "r.yaml:1:1"
    assert document.locations.find(("b", "c")) == "r.yaml:3:3"
    assert document.locations.find(("b", "d", "e")) == "r.yaml:4:7"
    assert document.locations.find(("b", "c", 1)) == "r.yaml:3:10"
    assert document.locations.find(("b", "c", 2)) == "r.yaml:3:3"  # what encloses it
    assert document.locations.find(("z",)) == "r.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001),  # text by YAML 1.1
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("010", 10),  # octal by YAML 1.1
        ("+3", 3),
        ("no", "no"),  # false by YAML 1.1
        ("1:30", "1:30"),  # 90 by YAML 1.1
        ("2026-11-22", "2026-11-22"),  # a date by YAML 1.1
        ("'1e-4'", "1e-4"),
        ("True", True),
        ("~", None),
        ("", None),
        (".inf", math.inf),
    ],
)
def test_scalars_are_read_by_the_core_rules_of_yaml_1_2(text: str, value: object) -> None:
    got = parse_yaml(f"x: {text}", "r.yaml").value["x"]

    assert got == value
    assert type(got) is type(value)


def test_a_key_that_comes_twice_is_a_problem_and_not_a_silent_choice() -> None:
    document = parse_yaml("training:\n  lr: 1\n  epochs: 2\n  lr: 3\n", "r.yaml")

    assert document.problems == ["r.yaml:4:3: key 'lr' is given twice"]


@pytest.mark.parametrize(
    ("text", "where"),
    [("a: [1", "r.yaml:1:6"), ("a: b: c", "r.yaml:1:5"), ("a: 1\n---\nb: 2", "r.yaml:2:1"), ("\x00", "r.yaml")],
)
def test_what_is_no_yaml_is_refused_with_its_place(text: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "r.yaml")

    assert str(caught.value).startswith(f"{where}: ")


def test_anchors_are_refused_so_that_a_bomb_stays_small() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

    with pytest.raises(UsageError, match="anchors and aliases"):
        parse_yaml(bomb, "r.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.getcwd []", "!mine x", "!!int x", "!!binary aGk=", "!!set {x}"]
)
def test_no_tag_makes_an_object(tag: str) -> None:
    try:
        document = parse_yaml(f"a: {tag}", "r.yaml")
    except UsageError:
        return

    assert document.problems
    assert document.value["a"] is None


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(UsageError):
        parse_yaml("[" * 20_000, "r.yaml")


def test_what_is_written_is_read_back_the_same() -> None:
    value = {"a": 1e-5, "b": "1e-4", "c": None, "d": [True, "true", "null", ""], "e": {"ü": "x: y # z"}, "f": -3}

    assert parse_yaml(dump_yaml(value), "r.yaml").value == value
    assert yaml.safe_load(dump_yaml({"lr": 1e-5})) == {"lr": 1e-5}  # by other readers too
    path = {"source": b"caf\xe9".decode("utf-8", "surrogateescape")}  # of a file whose name is not UTF-8
    assert parse_yaml(dump_yaml(path), "r.yaml").value == path


def test_recipes_are_read_by_this_reader_alone():
    """Another one would read ``off``, ``0x10`` and ``2024-01-01`` of a written recipe as no text."""
    root = Path(potstill.__file__).parent
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"^\s*import yaml", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert users == {"config/yaml.py"}
    words = ["off", "0x10", "2024-01-01", "1_000", "1:30", "on"]
    assert parse_yaml(dump_yaml(words), "x").value == words


@pytest.mark.parametrize("text", ["[{model:x/y}]", "{a: {model:x/y, b: 1}}"])
def test_a_colon_without_a_space_in_a_flow_mapping(text: str) -> None:
    with pytest.raises(UsageError, match="'model:x/y' needs a space after the colon: model: x/y"):
        parse_yaml(text, "--set assistants")


def test_a_quoted_key_may_contain_a_colon() -> None:
    assert parse_yaml('{"model:x": , "b:": 1}', "r.yaml").value == {"model:x": None, "b:": 1}
