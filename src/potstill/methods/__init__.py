"""The registry of methods: those of this folder, those of installed packages, and those named as code.

A class with a ``name`` is a method; ``catalog.json`` lists what the classes of this folder declare, so that help and
the checks of recipes do not import torch.  ``python -m potstill.methods.documentation`` writes it anew; as long as it
is older than the source, the classes themselves are read, which takes the seconds of importing torch.
Packages offer methods under the entry point ``potstill.methods``; ``package.module:Class`` and ``path/file.py:Class``
name one directly.
"""

import hashlib
import importlib
import inspect
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.code_references import is_code_reference, load_reference
from potstill.errors import UsageError, did_you_mean
from potstill.methods.requirements import Requirements
from potstill.methods.schedules import check_schedule
from potstill.options import (
    METHOD_SCHEMA,
    SCALING_SCHEMA,
    WEIGHT_SCHEMA,
    Option,
    example_values,
    option_problems,
    value_problems,
)

if TYPE_CHECKING:
    from potstill.methods.base import Method, Scaling


ENTRY_POINTS = "potstill.methods"
CATALOG_FILE = Path(__file__).parent / "catalog.json"  # written by potstill.methods.documentation
COSTS_FILE = CATALOG_FILE.with_name("price.json")  # written by benchmarks/method_price.py
PUBLISHED_FILE = CATALOG_FILE.with_name("published.json")  # top-1 of the student in the papers, by pair of networks
METHOD_SETTINGS = ("preset", "schedule", "scaling")  # what every method takes beside its options
METHOD_KINDS = (
    "logits", "feature maps", "embeddings", "several teachers", "peers", "no teacher", "around other methods",
)  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    venue: str  # with the year
    url: str


@dataclass(frozen=True)
class MethodInfo:
    """All that a method's class declares and its docstrings contain, for checks, help and documentation."""

    name: str
    target: str  # "module:Class"
    summary: str  # first line of the module's docstring
    kind: str  # one of METHOD_KINDS
    paper: Paper | None
    notes: str  # what follows the paper in the module's docstring: forms, differences to released code
    loss: str  # the whole loss in words, from the class's docstring
    terms: dict[str, str]  # by name of a function: its formula
    options: dict[str, Option]
    presets: dict[str, dict[str, Any]]  # by name: options that the authors chose for one pair of networks
    published: dict[str, float]  # top-1 in percent, by the same names
    requirements: Requirements | None  # with the default of each option; None: those of the methods inside it
    student_layers: tuple[str, ...]  # submodules that a student must have, by path
    traps: tuple[str, ...]

    @property
    def needs(self) -> list[str]:
        """What the method needs, in words."""
        listed = ["what the methods inside it need"] if self.requirements is None else self.requirements.listed()
        return [*listed, f"student's layers {' and '.join(self.student_layers)}"] if self.student_layers else listed

    @property
    def examples(self) -> dict[str, Any]:
        """A value for each option that has no default."""
        return example_values(self.options)

    @property
    def schedulable(self) -> list[str]:
        """The options that a schedule can change: numbers that count at every step.

        Example:
            >>> method_info("vid").schedulable
            ['weight', 'ce_weight']
        """
        return [key for key, each in self.options.items() if each.schema.get("type") == "number" and not each.fixed]


@dataclass(frozen=True)
class OptionProblem:
    """What is wrong with one option; ``option`` is None if the method's name itself is wrong."""

    option: str | None
    message: str

    def text(self, method: str) -> str:
        """One line for a message that has no file and line to show."""
        return self.message if self.option is None else f"method {method!r}: {self.message}"


def list_methods() -> list[str]:
    """Names that recipes accept under ``method.name``, sorted: ours, and those of installed packages."""
    return sorted({*_catalog()["methods"], *_entry_points()})


def list_own_methods() -> list[str]:
    """The names of the methods of this folder, sorted."""
    return sorted(_catalog()["methods"])


def methods_by_kind() -> dict[str, list[str]]:
    """The names of the methods of this folder, by kind."""
    return {kind: [name for name in list_own_methods() if method_info(name).kind == kind] for kind in METHOD_KINDS}


def list_logit_methods() -> list[str]:
    """The names of the methods of this folder that read logits of the teacher and nothing else of it, sorted."""
    found = ((name, method_info(name).requirements) for name in list_own_methods())
    return [name for name, needs in found if needs is not None and needs.teacher and not needs.teacher_layers]


def list_classless_methods(*, embeddings_only: bool = False) -> list[str]:
    """Return the methods of this folder that need no classes of the teacher, sorted; some with ``kd_weight: 0``."""
    found = []
    for name in list_own_methods():
        info = method_info(name)
        if info.requirements is None:
            continue
        needs = replace(info.requirements, soft_targets=False) if "kd_weight" in info.options else info.requirements
        if needs.teacher and not needs.teacher_classes and not (embeddings_only and needs.teacher_maps):
            found.append(name)
    return found


def method_classes() -> dict[str, str]:
    """The module of each method's class of this folder, by the class's name."""
    targets = [each["target"] for each in _catalog()["methods"].values()]
    return {target.partition(":")[2]: target.partition(":")[0] for target in targets}


def loss_functions() -> dict[str, str]:
    """The module of each loss of this folder, by the function's name."""
    return dict(_catalog()["functions"])


def method_info(name: str) -> MethodInfo:
    """Return what is known of one of ``list_methods()``, or of a method given as code; UsageError names the nearest."""
    if name in _catalog()["methods"]:
        return _own_info(name)
    return _outside_info(method_class(name), name)  # type: ignore[arg-type]  # classes are hashable


@cache
def _outside_info(kind: Any, name: str) -> MethodInfo:
    from potstill.methods.documentation import describe

    return describe(kind, name)


@cache
def _own_info(name: str) -> MethodInfo:
    own = _catalog()["methods"][name]
    return MethodInfo(
        **own
        | {
            "options": {key: Option(**each) for key, each in own["options"].items()},
            "paper": own["paper"] and Paper(**own["paper"]),
            "requirements": None if own["requirements"] is None else Requirements(**own["requirements"]),
            "student_layers": tuple(own["student_layers"]),
            "traps": tuple(own["traps"]),
        }
    )


def method_class(name: str) -> "type[Method]":
    """Return the class behind a name."""
    if name in (own := _catalog()["methods"]):
        module, _, attribute = own[name]["target"].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    elif is_code_reference(name):
        found = load_reference(name)
    elif name in _entry_points():
        found = load_reference(_entry_points()[name])
    elif name == "auto":
        raise UsageError(
            "auto is no method of its own: as the method of a whole recipe (--method auto) it becomes srd, dist or kd"
        )
    else:
        if name.startswith(("[", "{")):
            raise UsageError(f"no method {name!r}: give several methods, or one with options, as --set 'method={name}'")
        known = list_methods()
        raise UsageError(
            f"no method {name!r}{did_you_mean(name, known) or '.'} Known: {', '.join(known)}; or package.module:Class, "
            "path/file.py:Class"
        )
    from potstill.methods.base import Method

    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise UsageError(f"method {name!r} is no subclass of potstill.methods.base.Method, but {found!r}")
    return found


def create_method(
    name: str,
    *,
    preset: str | None = None,
    schedule: dict[str, Any] | None = None,
    scaling: "Scaling | None" = None,
    **options: Any,
) -> "Method":
    """Build a method by name.

    Args:
        name: one of ``list_methods()``, or the code of one: ``package.module:Class``, ``path/file.py:Class``.
        preset: the authors' options for one pair of networks, by name; ``options`` overrule them.
        schedule: weights and options that change with the epochs; see ``potstill.methods.wrappers``.
        scaling: "auto" bounds the teacher's terms by those of the labels (see ``potstill.distillation.distiller``),
            "paper" leaves all weights as they are; None: "paper".
        options: by name, as ``potstill methods NAME`` lists them.

    Raises:
        UsageError: unknown name, preset or option, missing option, value out of range.
    """
    settings = {"preset": preset, "schedule": schedule, "scaling": scaling}
    problems = check_method(name, {**options, **{key: each for key, each in settings.items() if each is not None}})
    if problems:
        raise UsageError("\n".join(problem.text(name) for problem in problems))
    info = method_info(name)
    method = method_class(name)(**{**(info.presets[preset] if preset else {}), **options})
    if schedule is not None:
        from potstill.methods.wrappers import ScheduledMethod

        method = ScheduledMethod(method, schedule, [key for key in schedule if key in info.options])
    method.scaling = scaling or "paper"
    return method


def recipe_scaling(settings: dict[str, Any]) -> str:
    """Return the ``scaling`` of a recipe's method: "auto", unless it is set there, its weights are the user's
    (``kd``), or they are the authors' for a training like theirs (``preset``).

    Example:
        >>> recipe_scaling({"name": "dkd"}), recipe_scaling({"name": "dkd", "preset": "cifar100/vgg13-vgg8"})
        ('auto', 'paper')
    """
    return str(settings.get("scaling") or ("paper" if settings["name"] == "kd" or "preset" in settings else "auto"))


def check_method(name: str, given: dict[str, Any]) -> list[OptionProblem]:
    """Everything that is wrong with a method's name and options; an empty list if all is well."""
    try:
        method = method_info(name)
    except UsageError as error:
        return [OptionProblem(None, str(error))]
    options = {key: value for key, value in given.items() if key not in METHOD_SETTINGS}
    preset, problems = given.get("preset"), []
    chosen = method.presets.get(preset) if isinstance(preset, str) else None
    if "preset" in given and chosen is None:
        known = f" Known: {', '.join(method.presets)}" if method.presets else f" {name} has none"
        close = did_you_mean(str(preset), method.presets) or "."
        problems.append(OptionProblem("preset", f"no preset {preset!r}{close}{known}"))
    if "scaling" in given:
        texts = value_problems("scaling", SCALING_SCHEMA, given["scaling"])
        problems += [OptionProblem("scaling", text) for text in texts]
    if "schedule" in given:
        texts = check_schedule(given["schedule"]) or _check_scheduled_values(method, given["schedule"])
        problems += [OptionProblem("schedule", text) for text in texts]
    for key, text in option_problems(method.options, options, chosen or ()):
        elsewhere = key not in method.options and key in method_info("kd").options  # recipes and flags may mean kd
        problems.append(OptionProblem(key, f"{text}; method kd has {key!r}" if elsewhere else text))
    for key, each in method.options.items():
        if key in options and options[key] is not None:
            problems += [OptionProblem(key, text) for text in _check_inner(key, each.schema, options[key])]
    return problems


def takes_methods(option: Option) -> bool:
    """Whether an option's value is a method, or a list of methods."""
    return METHOD_SCHEMA in (option.schema, option.schema.get("items"), *option.schema.get("anyOf", ()))


def _check_inner(key: str, schema: dict[str, Any], value: Any) -> list[str]:
    """Problems of the methods inside a method; their factor belongs to the one around them."""
    if schema.get("items") == METHOD_SCHEMA and isinstance(value, list):
        return [text for at, each in enumerate(value) for text in _check_inner(f"{key}[{at}]", METHOD_SCHEMA, each)]
    if METHOD_SCHEMA not in (schema, *schema.get("anyOf", ())):
        return []
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return [f"{key}.name must be given: a method is a mapping with a name, got {value!r}"]
    given = {option: each for option, each in value.items() if option not in ("name", "factor")}
    problems = [f"{key}.{problem.message}" for problem in check_method(value["name"], given)]
    if "scaling" in given:
        problems.append(f"{key}.scaling has no effect: scaling belongs to the outermost method, for all inside it")
    return problems + value_problems(f"{key}.factor", WEIGHT_SCHEMA, value.get("factor", 1.0))


def _check_scheduled_values(method: MethodInfo, schedule: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the values that a schedule gives to options and to the weights of terms."""
    problems, movable = [], method.schedulable
    for name, fields in schedule.items():
        if name in method.options and name not in movable:
            problems.append(
                f"schedule.{name}: {name} of {method.name} cannot change during training; what can: "
                f"{', '.join([*movable, 'the weight of a term, by its name'])}"
            )
            continue
        schema = method.options[name].schema if name in movable else WEIGHT_SCHEMA
        for key in ("start",) if fields.get("shape", "constant") == "constant" else ("start", "end"):
            problems += value_problems(f"schedule.{name}.{key}", schema, fields.get(key, 1.0))
    return problems


@dataclass(frozen=True)
class StepCost:
    """What a training step costs beside one on labels alone; see ``benchmarks/method_price.py``."""

    time: float  # the step's time over that of the student on labels alone
    low: float  # the lower and the upper quartile of that ratio
    high: float
    teacher: float  # what of it goes into the teacher's forward pass
    memory: float  # the step's peak of memory over the other's
    adapters: int  # trained numbers beside the student's
    machine: dict[str, Any] | None = None  # and rounds; None: as stated for all entries of the file
    rounds: int | None = None


@cache
def measured_costs() -> dict[str, Any]:
    """The file of prices as it is: machine, pair of networks, plain step, methods; {} if there is no measurement."""
    return json.loads(COSTS_FILE.read_text(encoding="utf-8")) if COSTS_FILE.is_file() else {}


def step_costs() -> dict[str, StepCost]:
    """Measured prices by name of the method."""
    return {name: StepCost(**values) for name, values in measured_costs().get("methods", {}).items()}


@cache
def _catalog() -> dict[str, Any]:
    """What the classes of this folder declare: from the file, or from the classes if these are newer."""
    if CATALOG_FILE.is_file():
        stored: dict[str, Any] = json.loads(CATALOG_FILE.read_text(encoding="utf-8"))
        if stored["digest"] == source_digest():
            return stored
    from potstill.methods.documentation import build_catalog

    return build_catalog()


def source_digest() -> str:
    """A digest of the source of this folder."""
    texts = [path.read_text(encoding="utf-8") for path in (*sorted(CATALOG_FILE.parent.glob("*.py")), PUBLISHED_FILE)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@cache
def _entry_points() -> dict[str, str]:
    """The methods that installed packages offer under names that are not ours."""
    from importlib.metadata import entry_points  # reads a file of every installed package

    found = entry_points(group=ENTRY_POINTS)
    return {point.name: point.value for point in found if point.name not in _catalog()["methods"]}


def normalize_method(method: Any) -> Any:
    """Return a list of methods as the method ``combined``, anything else unchanged.

    Example:
        >>> normalize_method([{"name": "kd"}, {"name": "crd", "factor": 0.8}])
        {'name': 'combined', 'methods': [{'name': 'kd'}, {'name': 'crd', 'factor': 0.8}]}
    """
    return {"name": "combined", "methods": method} if isinstance(method, list) else method


def inner_methods(settings: dict[str, Any]) -> list[tuple[tuple[str | int, ...], Any]]:
    """Return the methods inside a method, each with its path: ``("base_method",)``, ``("methods", 0)``; unchecked.

    A method from outside is not loaded: every option of it that looks like a method counts as one.
    """
    name = settings.get("name")
    if not isinstance(name, str):
        return []
    if name in list_own_methods():
        options = method_info(name).options
        inside = {key: settings[key] for key in options if settings.get(key) and takes_methods(options[key])}
    else:
        inside = {key: value for key, value in settings.items() if _looks_like_methods(value)}
    found: list[tuple[tuple[str | int, ...], Any]] = []
    for key, value in inside.items():
        if isinstance(value, list):
            found += [((key, position), each) for position, each in enumerate(value)]
        else:
            found.append(((key,), value))
    return found


def _looks_like_methods(value: Any) -> bool:
    methods = value if isinstance(value, list) else [value]
    return bool(methods) and all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in methods)


def needs_teacher(method: Any) -> bool:
    """Return whether a method needs a teacher, with the defaults of its options; True if it is unknown.

    Example:
        >>> needs_teacher({"name": "kd"}), needs_teacher({"name": "supervised"})
        (True, False)
        >>> needs_teacher([{"name": "supervised"}, {"name": "kd"}])
        True
    """
    settings = normalize_method(method)
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        return True
    if inner := inner_methods(settings):
        return any(needs_teacher(each) for _, each in inner)
    try:
        requirements = method_info(settings["name"]).requirements
    except UsageError:  # reported by check_method
        return True
    return requirements is None or requirements.teacher


def describe_method(method: Any) -> str:
    """Return a short label of a method, for tables and headings.

    Example:
        >>> (describe_method({"name": "ls", "base_method": {"name": "dkd"}}),
        ... describe_method([{"name": "kd"}, {"name": "crd"}]))
        ('ls around dkd', 'kd + crd')
        >>> describe_method({"name": "combined", "methods": [{"name": "kd"}, {"name": "crd", "factor": 0.8}]})
        'kd + 0.8 crd'
        >>> describe_method({"name": "kd", "schedule": {"temperature": {"shape": "linear"}}, "preset": "cifar100"})
        'kd (cifar100, scheduled temperature)'
    """
    settings = normalize_method(method)
    if not isinstance(settings, dict) or "name" not in settings:
        return ""
    name = str(settings["name"])
    if is_code_reference(name):
        name = name.rpartition(":")[2]
    inner = inner_methods(settings)
    if name == "combined" and inner:
        text = " + ".join(_describe_weighted(each) for _, each in inner)
    else:
        text = f"{name} around {describe_method(inner[0][1])}" if inner else name
    details = [str(settings["preset"])] if settings.get("preset") else []
    if isinstance(settings.get("schedule"), dict):
        details.append(f"scheduled {', '.join(map(str, settings['schedule']))}")
    return f"{text} ({', '.join(details)})" if details else text


def _describe_weighted(settings: Any) -> str:
    factor = settings.get("factor", 1) if isinstance(settings, dict) else 1
    return describe_method(settings) if factor == 1 else f"{factor:g} {describe_method(settings)}"
