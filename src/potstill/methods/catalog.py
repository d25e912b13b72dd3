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
from potstill.methods.wrapping.schedule import schedule_problems
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
        if extras:
            return f"{'a whole number' if extras[0].whole else 'a number'} {extras[0]}"
        if self.annotation.startswith("Literal["):
            return f"one of {_joined(choices(self.annotation))}"
        words = {"str": "text", "bool": "true or false", "MethodSettings": "a method: name and options"}
        return words.get(self.annotation, self.annotation.replace("MethodSettings", "methods"))


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
    presets: dict[str, dict[str, Any]]  # by name: options that the authors chose for one pair of networks
    published: dict[str, float]  # top-1 in percent, by the same names
    fixed: tuple[str, ...]  # options that take effect when the method is built, and no longer


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
    return Entry(
        name,
        summary,
        paper.strip(),
        ast.get_docstring(definition) or "",
        _options(definition),
        _literal(definition, "PRESETS"),
        _literal(definition, "PUBLISHED"),
        tuple(_literal(definition, "FIXED")),
    )


def options(name: str) -> dict[str, Option]:
    """The options of a method by name, in the order of its signature."""
    return entry(name).options


def check_method(name: str, given: dict[str, Any]) -> list[Problem]:
    """Everything that is wrong with a method's name and options; an empty list where all is well."""
    try:
        method = entry(name)
    except UsageError as error:
        return [Problem(None, str(error))]
    problems, known = [], method.options
    preset = given.get("preset")
    for key, value in given.items():
        if key == "preset":
            problems += _preset_problems(method, value)
        elif key == "schedule":
            problems += [
                Problem(key, message) for message in schedule_problems(value) or _schedule_problems(method, value)
            ]
        elif key not in known:
            takes = ", ".join(known) or "no options"
            problems.append(Problem(key, f"no option {key!r}{nearest(key, known) or '.'} It takes {takes}"))
        else:
            problems += [Problem(key, message) for message in option_problems(key, known[key].annotation, value)]
    filled = {*given, *method.presets.get(preset, {})} if isinstance(preset, str) else set(given)
    missing = [key for key, option in known.items() if option.default is REQUIRED and key not in filled]
    problems += [Problem(key, f"{key} must be given ({known[key].allowed})") for key in missing]
    return problems


def movable_options(name: str) -> list[str]:
    """The options of a method that a schedule can change: numbers that count at every step.

    Example:
        >>> movable_options("vid")
        ['weight', 'ce_weight']
    """
    return [
        key
        for key, option in entry(name).options.items()
        if option.annotation in ("Positive", "NonNegative", "Share", "float") and key not in entry(name).fixed
    ]


def _schedule_problems(method: Entry, schedule: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the values that a schedule gives to options and to the weights of terms."""
    problems, movable = [], movable_options(method.name)
    for name, fields in schedule.items():
        if name in method.options and name not in movable:
            problems.append(
                f"schedule.{name}: {name} of {method.name} cannot change during training; what can: "
                f"{', '.join([*movable, 'the weight of a term, by its name'])}"
            )
            continue
        annotation = method.options[name].annotation if name in movable else "NonNegative"
        for key in ("start",) if fields.get("shape", "constant") == "constant" else ("start", "end"):
            problems += option_problems(f"schedule.{name}.{key}", annotation, fields.get(key, 1.0))
    return problems


def option_problems(key: str, annotation: str, value: Any) -> list[str]:
    """What is wrong with one option's value, as sentences."""
    annotation, _, rest = annotation.partition(" | ")
    if rest == "None" and value is None:
        return []
    if annotation in OPTION_TYPES:
        trouble = fits(OPTION_TYPES[annotation], value)
        return [f"{key} {trouble}"] if trouble else []
    if annotation == "MethodSettings":
        return [f"{key}.{message}" for message in _inner_problems(value)]
    if annotation.startswith("list["):
        if not isinstance(value, list):
            return [f"{key} must be a list, got {value!r}"]
        inner = annotation[5:-1]
        return [text for at, each in enumerate(value) for text in option_problems(f"{key}[{at}]", inner, each)]
    if annotation.startswith("Literal["):
        allowed = choices(annotation)
        close = nearest(value, [each for each in allowed if isinstance(each, str)]) if isinstance(value, str) else ""
        return [] if value in allowed else [f"{key} must be one of {_joined(allowed)}, got {value!r}{close}"]
    plain: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
    fitting = plain.get(annotation)
    if fitting and (not isinstance(value, fitting) or (isinstance(value, bool) and annotation != "bool")):
        return [f"{key} must be {annotation}, got {value!r}"]
    return []


def choices(annotation: str) -> tuple[Any, ...]:
    """The values of ``Literal[...]`` as written in a signature."""
    return tuple(ast.literal_eval(f"({annotation.removeprefix('Literal[').removesuffix(']')},)"))


def _inner_problems(settings: Any) -> list[str]:
    """A method inside a method; its factor belongs to the one around it."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        return [f"name must be given: a method is a mapping with a name, got {settings!r}"]
    given = {key: value for key, value in settings.items() if key not in ("name", "factor")}
    problems = [problem.message for problem in check_method(settings["name"], given)]
    factor = fits(OPTION_TYPES["NonNegative"], settings.get("factor", 1.0))
    return problems + ([f"factor {factor}"] if factor else [])


def _preset_problems(method: Entry, preset: Any) -> list[Problem]:
    if isinstance(preset, str) and preset in method.presets:
        return []
    known = f" Known: {', '.join(method.presets)}" if method.presets else f" {method.name} has none"
    close = nearest(str(preset), method.presets)
    return [Problem("preset", f"no preset {preset!r}{close or '.'}{known}")]


def _joined(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


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


def _literal(definition: ast.ClassDef, name: str) -> dict[str, Any]:
    """A class attribute that is written out; empty where the class has none of that name."""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            assert node.value is not None
            value: dict[str, Any] = ast.literal_eval(node.value)
            return value
    return {}


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"METHODS names {module}, which does not exist")
    return Path(spec.origin).read_text(encoding="utf-8")
