import math
from typing import Literal

import pytest

from potstill.errors import UsageError
from potstill.options import Count, Epochs, NonNegative, Positive, Share, checked, json_schema, value_problems


@checked
def options(*, a: Positive = 1.0, b: NonNegative = 0.0, c: Share = 0.5, d: Count = 1, name: str = "x") -> float:
    return a + b + c + d


@pytest.mark.parametrize(
    "good", [{"a": 1e-9}, {"a": 3}, {"b": 0}, {"c": 0}, {"c": 1.0}, {"d": 1}, {"d": 10**9}, {"name": -1}]
)
def test_allowed(good):
    assert options(**good) is not None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": 0}, "a must be above 0, got 0"),
        ({"a": math.inf}, "a must be above 0, got inf"),
        ({"a": math.nan}, "a must be above 0, got nan"),
        ({"b": -1e-9}, "b must be at least 0"),
        ({"c": 1.5}, "c must be from 0 to 1, got 1.5"),
        ({"c": "1"}, "c must be a number from 0 to 1, got '1'"),
        ({"d": 0}, "d must be at least 1"),
        ({"d": 1.0}, "d must be a whole number at least 1"),
        ({"d": True}, "d must be a whole number"),
    ],
)
def test_refused(bad, message):
    with pytest.raises(UsageError, match=message):
        options(**bad)


@pytest.mark.parametrize("good", [0, 2.5, 300, "0%", "5%", "12.5%", "100%"])
def test_epochs_are_a_number_or_a_share(good):
    assert value_problems("e", json_schema(Epochs), good) == []
    assert value_problems("e", json_schema(Epochs | None), None) == []


@pytest.mark.parametrize("bad", [-1, True, "5", "101%", "-5%", "5 %", "%", "100.5%", "nan%", "5%\n"])
def test_refused_as_epochs(bad):
    assert value_problems("e", json_schema(Epochs), bad) == [
        f"e must be a number at least 0 or a share of the training such as 10%, got {bad!r}"
    ]


def test_a_range_on_a_positional_argument_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="must be keyword-only"):

        @checked
        def wrong(a: Positive) -> float:
            return a


@checked
def chosen(*, form: Literal["paper", "release"] = "paper") -> str:
    return form


def test_choices_are_checked_with_the_nearest_one():
    assert chosen() == "paper"
    assert chosen(form="release") == "release"
    with pytest.raises(UsageError, match="form must be one of paper, release, got 'papre'; did you mean 'paper'"):
        chosen(form="papre")
