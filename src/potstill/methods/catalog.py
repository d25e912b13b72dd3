"""What each method takes, read from its source: recipes and help need it before anybody imports torch."""

import ast
import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from potstill.errors import UsageError, nearest
from potstill.methods import METHODS, list_methods
from potstill.options import OPTION_TYPES, fits

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One keyword of a method's ``__init__``."""

    annotation: str  # as written: "Positive", "str"
    default: Any  # REQUIRED where there is none

    @property
    def allowed(self) -> str:
        """For people: ``"a number above 0"``, ``"str"``."""
        extras = getattr(OPTION_TYPES.get(self.annotation), "__metadata__", ())
        return f"{'a whole number' if extras[0].whole else 'a number'} {extras[0]}" if extras else self.annotation


@dataclass(frozen=True)
class Problem:
    """What is wrong with one option; ``option`` is None where the method's name itself is wrong."""

    option: str | None
    message: str

    def text(self, method: str) -> str:
        """One line for a message that has no file and line to show."""
        return self.message if self.option is None else f"method {method!r}: {self.message}"


@dataclass(frozen=True)
class Entry:
    """A method as its source file shows it."""

    name: str
    summary: str  # first line of the module's docstring
    paper: str  # the rest of it
    doc: str  # the class's docstring
    options: dict[str, Option]


@cache
def entry(name: str) -> Entry:
    """Look a method up.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r}{nearest(name, METHODS) or '.'} Known: {', '.join(list_methods())}")
    module, _, class_name = METHODS[name].partition(":")
    tree = ast.parse(_source(module))
    summary, _, paper = (ast.get_docstring(tree) or "").partition("\n")
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return Entry(name, summary, paper.strip(), ast.get_docstring(definition) or "", _options(definition))


def options(name: str) -> dict[str, Option]:
    """The options of a method by name, in the order of its signature."""
    return entry(name).options


def check_method(name: str, given: dict[str, Any]) -> list[Problem]:
    """Everything that is wrong with a method's name and options; an empty list where all is well."""
    try:
        known = options(name)
    except UsageError as error:
        return [Problem(None, str(error))]
    problems = []
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(known) or "no options"
            problems.append(Problem(key, f"no option {key!r}{nearest(key, known) or '.'} It takes {takes}"))
        elif trouble := _trouble(known[key], value):
            problems.append(Problem(key, f"{key} {trouble}"))
    missing = [key for key, option in known.items() if option.default is REQUIRED and key not in given]
    problems += [Problem(key, f"{key} must be given ({known[key].allowed})") for key in missing]
    return problems


def _trouble(option: Option, value: Any) -> str | None:
    if option.annotation in OPTION_TYPES:
        return fits(OPTION_TYPES[option.annotation], value)
    plain: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
    allowed = plain.get(option.annotation)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and option.annotation != "bool")):
        return f"must be {option.annotation}, got {value!r}"
    return None


def _options(definition: ast.ClassDef) -> dict[str, Option]:
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return {
                argument.arg: Option(
                    ast.unparse(argument.annotation) if argument.annotation else "Any",
                    REQUIRED if default is None else ast.literal_eval(default),
                )
                for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            }
    return {}


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"METHODS names {module}, which does not exist")
    return Path(spec.origin).read_text(encoding="utf-8")
