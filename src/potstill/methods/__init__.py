"""The registry of methods: one file per paper; one line in METHODS makes a method known to recipes, command line, docs
and tests.

The lines are strings, and what each method takes (options, presets, published accuracies, paper) is read from its
source, so that help and the checks of recipes do not import torch.
"""

import ast
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from potstill.errors import UsageError, did_you_mean
from potstill.methods.schedules import check_schedule
from potstill.options import OPTION_TYPES, range_problem

if TYPE_CHECKING:
    from potstill.methods.base import Method


METHODS: dict[str, str] = {
    "ab": "potstill.methods.ab:AB",
    "abkd": "potstill.methods.abkd:ABKD",
    "afd": "potstill.methods.afd:AFD",
    "at": "potstill.methods.at:AT",
    "bkd": "potstill.methods.bkd:BKD",
    "camkd": "potstill.methods.camkd:CAMKD",
    "cat_kd": "potstill.methods.cat_kd:CATKD",
    "cc": "potstill.methods.cc:CC",
    "combined": "potstill.methods.combined:Combined",
    "crd": "potstill.methods.crd:CRD",
    "crld": "potstill.methods.crld:CRLD",
    "cskd": "potstill.methods.cskd:CSKD",
    "ctkd": "potstill.methods.ctkd:CTKD",
    "deit_hard": "potstill.methods.deit:DeiTHard",
    "deit_soft": "potstill.methods.deit:DeiTSoft",
    "dist": "potstill.methods.dist:DIST",
    "dkd": "potstill.methods.dkd:DKD",
    "dml": "potstill.methods.dml:DML",
    "dtkd": "potstill.methods.dtkd:DTKD",
    "eakd": "potstill.methods.eakd:EAKD",
    "eskd": "potstill.methods.eskd:ESKD",
    "fitnet": "potstill.methods.fitnet:FitNet",
    "fsp": "potstill.methods.fsp:FSP",
    "ft": "potstill.methods.ft:FT",
    "gkl": "potstill.methods.gkl:GKL",
    "ickd": "potstill.methods.ickd:ICKD",
    "ikl": "potstill.methods.ikl:IKL",
    "itrd": "potstill.methods.itrd:ITRD",
    "kd": "potstill.methods.kd:KD",
    "logit_mse": "potstill.methods.logit_mse:LogitMSE",
    "ls": "potstill.methods.ls:LS",
    "mgd": "potstill.methods.mgd:MGD",
    "mlld": "potstill.methods.mlld:MLLD",
    "nd": "potstill.methods.nd:ND",
    "nkd": "potstill.methods.nkd:NKD",
    "norm": "potstill.methods.norm:NORM",
    "nst": "potstill.methods.nst:NST",
    "ofa": "potstill.methods.ofa:OFA",
    "ofd": "potstill.methods.ofd:OFD",
    "pkt": "potstill.methods.pkt:PKT",
    "pskd": "potstill.methods.pskd:PSKD",
    "reviewkd": "potstill.methods.reviewkd:ReviewKD",
    "rkd": "potstill.methods.rkd:RKD",
    "rld": "potstill.methods.rld:RLD",
    "sdd": "potstill.methods.sdd:SDD",
    "semckd": "potstill.methods.semckd:SemCKD",
    "simkd": "potstill.methods.simkd:SimKD",
    "sp": "potstill.methods.sp:SP",
    "srd": "potstill.methods.srd:SRD",
    "srrl": "potstill.methods.srrl:SRRL",
    "supervised": "potstill.methods.supervised:Supervised",
    "tfkd_reg": "potstill.methods.tfkd:TfKDReg",
    "tfkd_self": "potstill.methods.tfkd:TfKDSelf",
    "ttm": "potstill.methods.ttm:TTM",
    "uskd": "potstill.methods.uskd:USKD",
    "vid": "potstill.methods.vid:VID",
    "vitkd": "potstill.methods.vitkd:ViTKD",
    "vkd": "potstill.methods.vkd:VkD",
    "wkd_f": "potstill.methods.wkd_f:WKDF",
    "wkd_l": "potstill.methods.wkd_l:WKDL",
    "wsld": "potstill.methods.wsld:WSLD",
    "wttm": "potstill.methods.wttm:WTTM",
}


RENAMED_OPTIONS = {"around": "base_method"}  # former names, and what they are called now


def list_methods() -> list[str]:
    """Names that recipes accept under ``method.name``, sorted."""
    return sorted(METHODS)


def method_class(name: str) -> "type[Method]":
    """The class behind a name.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r}{did_you_mean(name, METHODS) or '.'} Known: {', '.join(list_methods())}")
    module, _, attribute = METHODS[name].partition(":")
    return cast("type[Method]", getattr(importlib.import_module(module), attribute))


def create_method(
    name: str, *, preset: str | None = None, schedule: dict[str, Any] | None = None, **options: Any
) -> "Method":
    """Build a method by name.

    Args:
        name: a key of METHODS.
        preset: the authors' options for one pair of networks, by name; ``options`` overrule them.
        schedule: weights and options that change with the epochs; see ``potstill.methods.wrappers``.
        options: keywords of the method's ``__init__``.

    Raises:
        UsageError: unknown name, preset or option, missing option, value out of range.
    """
    problems = check_method(name, {**options, **_without_none(preset=preset, schedule=schedule)})
    if problems:
        raise UsageError("\n".join(problem.text(name) for problem in problems))
    method = method_class(name)(**{**(method_info(name).presets[preset] if preset else {}), **options})
    if schedule is None:
        return method
    from potstill.methods.wrappers import ScheduledMethod

    return ScheduledMethod(method, schedule, [key for key in schedule if key in method_info(name).options])


def _without_none(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class MethodOption:
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
            return f"one of {_comma_separated(literal_choices(self.annotation))}"
        words = {"str": "text", "bool": "true or false", "MethodSettings": "a method: name and options"}
        return words.get(self.annotation, self.annotation.replace("MethodSettings", "methods"))


@dataclass(frozen=True)
class OptionProblem:
    """What is wrong with one option; ``option`` is None where the method's name itself is wrong."""

    option: str | None
    message: str

    def text(self, method: str) -> str:
        """One line for a message that has no file and line to show."""
        return self.message if self.option is None else f"method {method!r}: {self.message}"


@dataclass(frozen=True)
class MethodInfo:
    """A method as its source file shows it."""

    name: str
    summary: str  # first line of the module's docstring
    paper: str  # the rest of it
    doc: str  # the class's docstring
    options: dict[str, MethodOption]
    presets: dict[str, dict[str, Any]]  # by name: options that the authors chose for one pair of networks
    published: dict[str, float]  # top-1 in percent, by the same names
    fixed: tuple[str, ...]  # options that take effect when the method is built, and no longer


@cache
def method_info(name: str) -> MethodInfo:
    """Look a method up.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r}{did_you_mean(name, METHODS) or '.'} Known: {', '.join(list_methods())}")
    module, _, class_name = METHODS[name].partition(":")
    tree = ast.parse(_read_source(module))
    summary, _, paper = (ast.get_docstring(tree) or "").partition("\n")
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return MethodInfo(
        name,
        summary,
        paper.strip(),
        ast.get_docstring(definition) or "",
        _parse_options(definition),
        _parse_literal(definition, "PRESETS"),
        _parse_literal(definition, "PUBLISHED"),
        tuple(_parse_literal(definition, "FIXED")),
    )


def method_options(name: str) -> dict[str, MethodOption]:
    """The options of a method by name, in the order of its signature."""
    return method_info(name).options


def check_method(name: str, given: dict[str, Any]) -> list[OptionProblem]:
    """Everything that is wrong with a method's name and options; an empty list where all is well."""
    try:
        method = method_info(name)
    except UsageError as error:
        return [OptionProblem(None, str(error))]
    problems, known = [], method.options
    preset = given.get("preset")
    for key, value in given.items():
        if key == "preset":
            problems += _check_preset(method, value)
        elif key == "schedule":
            problems += [
                OptionProblem(key, message)
                for message in check_schedule(value) or _check_scheduled_values(method, value)
            ]
        elif key not in known:
            takes, new = ", ".join(known) or "no options", RENAMED_OPTIONS.get(key)
            near = f"; it is called {new!r} now." if new in known else did_you_mean(key, known) or "."
            problems.append(OptionProblem(key, f"no option {key!r}{near} It takes {takes}"))
        else:
            problems += [OptionProblem(key, message) for message in check_option(key, known[key].annotation, value)]
    filled = {*given, *method.presets.get(preset, {})} if isinstance(preset, str) else set(given)
    missing = [key for key, option in known.items() if option.default is REQUIRED and key not in filled]
    problems += [OptionProblem(key, f"{key} must be given ({known[key].allowed})") for key in missing]
    return problems


def schedulable_options(name: str) -> list[str]:
    """The options of a method that a schedule can change: numbers that count at every step.

    Example:
        >>> schedulable_options("vid")
        ['weight', 'ce_weight']
    """
    return [
        key
        for key, option in method_info(name).options.items()
        if option.annotation in ("Positive", "NonNegative", "Share", "float") and key not in method_info(name).fixed
    ]


def _check_scheduled_values(method: MethodInfo, schedule: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the values that a schedule gives to options and to the weights of terms."""
    problems, movable = [], schedulable_options(method.name)
    for name, fields in schedule.items():
        if name in method.options and name not in movable:
            problems.append(
                f"schedule.{name}: {name} of {method.name} cannot change during training; what can: "
                f"{', '.join([*movable, 'the weight of a term, by its name'])}"
            )
            continue
        annotation = method.options[name].annotation if name in movable else "NonNegative"
        for key in ("start",) if fields.get("shape", "constant") == "constant" else ("start", "end"):
            problems += check_option(f"schedule.{name}.{key}", annotation, fields.get(key, 1.0))
    return problems


def check_option(key: str, annotation: str, value: Any) -> list[str]:
    """What is wrong with one option's value, as sentences."""
    annotation, _, rest = annotation.partition(" | ")
    if rest == "None" and value is None:
        return []
    if annotation in OPTION_TYPES:
        trouble = range_problem(OPTION_TYPES[annotation], value)
        return [f"{key} {trouble}"] if trouble else []
    if annotation == "MethodSettings":
        return [f"{key}.{message}" for message in _check_inner_method(value)]
    if annotation.startswith("list["):
        if not isinstance(value, list):
            return [f"{key} must be a list, got {value!r}"]
        inner = annotation[5:-1]
        return [text for at, each in enumerate(value) for text in check_option(f"{key}[{at}]", inner, each)]
    if annotation.startswith("Literal["):
        allowed = literal_choices(annotation)
        close = (
            did_you_mean(value, [each for each in allowed if isinstance(each, str)]) if isinstance(value, str) else ""
        )
        return [] if value in allowed else [f"{key} must be one of {_comma_separated(allowed)}, got {value!r}{close}"]
    plain: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
    fitting = plain.get(annotation)
    if fitting and (not isinstance(value, fitting) or (isinstance(value, bool) and annotation != "bool")):
        return [f"{key} must be {annotation}, got {value!r}"]
    return []


def literal_choices(annotation: str) -> tuple[Any, ...]:
    """The values of ``Literal[...]`` as written in a signature."""
    return tuple(ast.literal_eval(f"({annotation.removeprefix('Literal[').removesuffix(']')},)"))


def _check_inner_method(settings: Any) -> list[str]:
    """A method inside a method; its factor belongs to the one around it."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        return [f"name must be given: a method is a mapping with a name, got {settings!r}"]
    given = {key: value for key, value in settings.items() if key not in ("name", "factor")}
    problems = [problem.message for problem in check_method(settings["name"], given)]
    factor = range_problem(OPTION_TYPES["NonNegative"], settings.get("factor", 1.0))
    return problems + ([f"factor {factor}"] if factor else [])


def _check_preset(method: MethodInfo, preset: Any) -> list[OptionProblem]:
    if isinstance(preset, str) and preset in method.presets:
        return []
    known = f" Known: {', '.join(method.presets)}" if method.presets else f" {method.name} has none"
    close = did_you_mean(str(preset), method.presets)
    return [OptionProblem("preset", f"no preset {preset!r}{close or '.'}{known}")]


def _comma_separated(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


def _parse_options(definition: ast.ClassDef) -> dict[str, MethodOption]:
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return {
                argument.arg: MethodOption(
                    ast.unparse(argument.annotation) if argument.annotation else "Any",
                    REQUIRED if default is None else ast.literal_eval(default),
                )
                for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            }
    return {}


def _parse_literal(definition: ast.ClassDef, name: str) -> dict[str, Any]:
    """A class attribute that is written out; empty where the class has none of that name."""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            assert node.value is not None
            value: dict[str, Any] = ast.literal_eval(node.value)
            return value
    return {}


def _read_source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"METHODS names {module}, which does not exist")
    return Path(spec.origin).read_text(encoding="utf-8")
