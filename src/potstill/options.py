"""Option types with their allowed range, readable without importing torch.

``temperature: Positive = 2.0`` in a signature is the one declaration from which the check at call time, the check of
recipes, the command line's help and the documentation follow.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec, TypeVar

from potstill.errors import UsageError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Range:
    """Allowed numbers: ``low <= x <= high``, or ``low < x`` with ``open_low``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    whole: bool = False

    def problem(self, value: object) -> str | None:
        """Return why ``value`` is not allowed, or None."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return f"must be {'a whole number' if self.whole else 'a number'} {self}, got {value!r}"
        low_enough = value > self.low if self.open_low else value >= self.low
        if not (low_enough and value <= self.high and math.isfinite(value)):
            return f"must be {self}, got {value!r}"
        return None

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return (
            f"above {self.low:g} and at most {self.high:g}" if self.open_low else f"from {self.low:g} to {self.high:g}"
        )


Positive = Annotated[float, Range(low=0, open_low=True)]
NonNegative = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]
Count = Annotated[int, Range(low=1, whole=True)]

MethodSettings = dict[str, Any]  # name and options of a nested method, as in a recipe

OPTION_TYPES = {"Positive": Positive, "NonNegative": NonNegative, "Share": Share, "Count": Count}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check keyword arguments against the ranges and choices in the function's annotations.

    Raises (at call time):
        UsageError: a ValueError that names the option, the allowed range and what came.

    Example:
        >>> @checked
        ... def soften(*, temperature: Positive) -> float:
        ...     return 1 / temperature
        >>> soften(temperature=0)
        Traceback (most recent call last):
        ...
        potstill.errors.UsageError: temperature must be above 0, got 0
    """
    hints = typing.get_type_hints(function, include_extras=True)
    choices = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    ranges = {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Range)
    }
    positional = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name in ranges and parameter.kind is not parameter.KEYWORD_ONLY
    ]
    if positional:
        raise TypeError(f"{function.__qualname__}: options with a range must be keyword-only: {positional}")

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, allowed in ranges.items():
            if name in kwargs and (problem := allowed.problem(kwargs[name])):
                raise UsageError(f"{name} {problem}")
        for name, values in choices.items():
            if name in kwargs and kwargs[name] not in values:
                close = did_you_mean(str(kwargs[name]), map(str, values))
                raise UsageError(f"{name} must be one of {', '.join(map(str, values))}, got {kwargs[name]!r}{close}")
        return function(*args, **kwargs)

    return wrapper


def range_problem(annotation: Any, value: object) -> str | None:
    """Return why ``value`` does not fit an option's annotation, or None."""
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Range):
            return extra.problem(value)
    return None
