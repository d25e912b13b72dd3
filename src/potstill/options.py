"""Options: a name, a type with its allowed range, a default and a description, declared once and without torch.

``temperature: Positive = option(default=2.0, doc="T of both")`` in a class is the one declaration from which the check
at call time, the check of recipes, their JSON schema, the command line's help and the documentation follow.  Types
become JSON schemas, which is what values are checked against.
"""

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union

from potstill.errors import UsageError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")
Schema = dict[str, Any]  # JSON schema of a value

REQUIRED: Any = inspect.Parameter.empty  # default of an option that has none


@dataclass(frozen=True)
class Range:
    """Allowed numbers: ``low <= x <= high``, or ``low < x`` with ``open_low``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False


@dataclass(frozen=True)
class Pattern:
    """Allowed text: what a regular expression matches as a whole; ``description`` is for people."""

    expression: str
    description: str


@dataclass(frozen=True)
class Reference:
    """A value with a schema of its own, by that schema's name."""

    name: str


Positive = Annotated[float, Range(low=0, open_low=True)]
NonNegative = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]
Count = Annotated[int, Range(low=1)]
# A length of time or a point in it: a number of epochs, or a share of the training such as "10%".
Epochs = (
    Annotated[float, Range(low=0)]
    | Annotated[str, Pattern(r"(100(\.0+)?|\d{1,2}(\.\d+)?)%", "a share of the training such as 10%")]
)
MethodSettings = Annotated[dict[str, Any], Reference("Method")]  # a method inside a method: name and options

METHOD_SCHEMA: Schema = {"$ref": "#/$defs/Method"}
WEIGHT_SCHEMA: Schema = {"type": "number", "minimum": 0}
SCALING_SCHEMA: Schema = {"enum": ["paper", "auto"]}

_PLAIN: dict[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    dict: "object",
    list: "array",
}
_PYTHON: dict[str, tuple[type, ...]] = {
    "boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip
_WORDS = {
    "boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text",
    "object": "a mapping", "array": "a list", "null": "null",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """A declared option; its schema is known once the class is made."""

    doc: str
    default: Any = REQUIRED
    fixed: bool = False
    schema: Schema = field(default_factory=dict)
    of_epochs: int | None = None


def option(*, default: Any = REQUIRED, doc: str, fixed: bool = False, of_epochs: int | None = None) -> Any:
    """Declare an option in the body of a method's class, after its name and type.

    Args:
        default: its value if it is not given; without one it must be given.
        doc: what it is, in one sentence, for help, docs and schema.
        fixed: it takes effect when the method is built, so that a schedule cannot change it later.
        of_epochs: length of the authors' training, of which the default is a number of epochs; a shorter training takes
            the same share instead.
    """
    return Option(doc, default, fixed, of_epochs=of_epochs)


def json_schema(annotation: Any) -> Schema:
    """Return the JSON schema of a type: numbers with range, ``Literal``, ``list``, ``dict``, ``| None``, plain; else
    TypeError.

    Example:
        >>> json_schema(Share)
        {'type': 'number', 'minimum': 0, 'maximum': 1}
        >>> json_schema(Literal["a", "b"] | None)
        {'anyOf': [{'enum': ['a', 'b']}, {'type': 'null'}]}
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        schema = json_schema(arguments[0])
        for extra in arguments[1:]:
            if isinstance(extra, Reference):
                schema = {"$ref": f"#/$defs/{extra.name}"}
            elif isinstance(extra, Pattern):
                schema |= {"pattern": f"^(?:{extra.expression})$", "description": extra.description}
            elif isinstance(extra, Range):
                limits = {"exclusiveMinimum" if extra.open_low else "minimum": extra.low, "maximum": extra.high}
                schema |= {key: limit for key, limit in limits.items() if math.isfinite(limit)}
        return schema
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [json_schema(part) for part in arguments]}
    if origin is list:
        return {"type": "array", "items": json_schema(arguments[0])}
    if origin is dict:
        return {"type": "object"}
    if annotation is None or annotation is type(None):
        return {"type": "null"}
    if annotation not in _PLAIN:
        raise TypeError(f"an option cannot be of type {annotation!r}: use float, int, bool, str, Literal, list or dict")
    return {"type": _PLAIN[annotation]}


def allowed_values(schema: Schema) -> str:
    """The values that a schema allows, for people.

    Example:
        >>> allowed_values({"type": "number", "exclusiveMinimum": 0}), allowed_values({"enum": ["a", "b"]})
        ('a number above 0', 'one of a, b')
    """
    if "enum" in schema:
        return f"one of {_listed(schema['enum'])}"
    if "anyOf" in schema:
        return " or ".join(allowed_values(each) for each in schema["anyOf"])
    if schema == METHOD_SCHEMA:
        return "a method: name and options"
    if schema.get("type") == "array" and "items" in schema:
        inner = schema["items"]
        return "a list of methods" if inner == METHOD_SCHEMA else f"a list, each {allowed_values(inner)}"
    if "pattern" in schema:
        return str(schema["description"])
    return " ".join(part for part in (_WORDS.get(schema.get("type", ""), "a value"), _limits(schema)) if part)


def value_problems(key: str, schema: Schema, value: Any) -> list[str]:
    """Everything that is wrong with a value, as sentences that begin with ``key``; references are not followed."""
    if "anyOf" in schema:
        tried = [value_problems(key, each, value) for each in schema["anyOf"]]
        if [] in tried:
            return []
        if any("pattern" in each for each in schema["anyOf"]):
            return [f"{key} must be {allowed_values(schema)}, got {value!r}"]
        return tried[0]
    if "enum" in schema:
        if any(value == each and type(value) is type(each) for each in schema["enum"]):
            return []
        names = [each for each in schema["enum"] if isinstance(each, str)]
        close = did_you_mean(value, names) if isinstance(value, str) else ""
        return [f"{key} must be one of {_listed(schema['enum'])}, got {value!r}{close}"]
    kind = schema.get("type")
    if kind is None:
        return []
    fits = isinstance(value, _PYTHON[kind]) and (kind == "boolean" or not isinstance(value, bool))
    limits = _limits(schema)
    if not fits:
        return [f"{key} must be {' '.join(part for part in (_WORDS[kind], limits) if part)}, got {value!r}"]
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        return [f"{key} must be {allowed_values(schema)}, got {value!r}"]
    if kind == "array":
        inner = schema.get("items", {})
        return [text for at, each in enumerate(value) for text in value_problems(f"{key}[{at}]", inner, each)]
    if kind in ("integer", "number"):
        low, above = schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf)
        inside = low <= value <= schema.get("maximum", math.inf) and (value > above or above == -math.inf)
        if not inside or not math.isfinite(value):
            return [f"{key} must be {limits or 'finite'}, got {value!r}"]
    return []


RENAMED_OPTIONS = {
    "around": "base_method",
    "warmup": "warmup_epochs",
    "factor": "reduction",
}  # former names, and what they are called now


def option_problems(
    options: Mapping[str, Option], given: Mapping[str, Any], filled: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Everything that is wrong with what is given for options, as (option, sentence)."""
    problems = []
    for key, value in given.items():
        if key in options:
            problems += [(key, text) for text in value_problems(key, options[key].schema, value)]
        else:
            takes, new = ", ".join(options) or "no options", RENAMED_OPTIONS.get(key)
            near = f"; it is called {new!r} now." if new in options else did_you_mean(key, options) or "."
            problems.append((key, f"no option {key!r}{near} It takes {takes}"))
    missing = [key for key, each in options.items() if each.default is REQUIRED and key not in {*given, *filled}]
    return problems + [(key, f"{key} must be given ({allowed_values(options[key].schema)})") for key in missing]


def example_values(options: Mapping[str, Option]) -> dict[str, Any]:
    """A value for each option that has no default: one that its type allows.

    Example:
        >>> example_values({"a": Option("size", schema={"type": "integer", "minimum": 1}), "b": Option("flag", False)})
        {'a': 1}
    """
    return {key: _example(each.schema) for key, each in options.items() if each.default is REQUIRED}


def _example(schema: Schema) -> Any:
    if schema == METHOD_SCHEMA:
        return {"name": "kd"}
    if schema.get("items") == METHOD_SCHEMA:
        return [{"name": "kd"}, {"name": "at", "factor": 0.5}]
    if "enum" in schema:
        return schema["enum"][0]
    numbers = {"integer": int(schema.get("minimum", 1)), "number": float(schema.get("maximum", 1.0))}
    return {"string": "", "boolean": False, "array": [], "object": {}, **numbers}.get(schema.get("type", ""))


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check keyword arguments against the ranges and choices in the function's annotations, at call time.

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
    schemas = {
        name: json_schema(hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal or any(isinstance(e, Range) for e in getattr(hint, "__metadata__", ()))
    }
    parameters = inspect.signature(function).parameters
    positional = [name for name in schemas if name != "return" and parameters[name].kind.name != "KEYWORD_ONLY"]
    if positional:
        raise TypeError(f"{function.__qualname__}: options with a range must be keyword-only: {positional}")

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, schema in schemas.items():
            if name in kwargs and (problems := value_problems(name, schema, kwargs[name])):
                raise UsageError(problems[0])
        return function(*args, **kwargs)

    return wrapper


def _limits(schema: Schema) -> str:
    low, above, high = schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("maximum")
    if high is None:
        return f"above {above:g}" if above is not None else f"at least {low:g}" if low is not None else ""
    return f"above {above:g} and at most {high:g}" if above is not None else f"from {low or 0:g} to {high:g}"


def _listed(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values)
