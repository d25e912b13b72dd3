"""A recipe's method as plain values: one mapping, or a list of methods that are added up."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from potstill.methods import METHODS, method_options


def normalize_method(method: Any) -> Any:
    """A list of methods is short for the method ``combined``; anything else stays as it is.

    Example:
        >>> normalize_method([{"name": "kd"}, {"name": "crd", "factor": 0.8}])
        {'name': 'combined', 'methods': [{'name': 'kd'}, {'name': 'crd', 'factor': 0.8}]}
    """
    return {"name": "combined", "methods": method} if isinstance(method, list) else method


def inner_methods(settings: dict[str, Any]) -> list[tuple[tuple[str | int, ...], Any]]:
    """The methods inside a method, each with its path: ``("base_method",)``, ``("methods", 0)``.

    Empty for an unknown name; what stands there may be anything, since nobody has checked it.
    """
    name = settings.get("name")
    if not isinstance(name, str) or name not in METHODS:
        return []
    found: list[tuple[tuple[str | int, ...], Any]] = []
    for key, option in method_options(name).items():
        value = settings.get(key)
        if value is None or "MethodSettings" not in option.annotation:
            continue
        if option.annotation.startswith("list[") and isinstance(value, list):
            found += [((key, position), each) for position, each in enumerate(value)]
        elif not option.annotation.startswith("list["):
            found.append(((key,), value))
    return found


def needs_teacher(method: Any) -> bool:
    """Whether a method learns from a teacher, read from its source as torch is not loaded for recipes; True where in
    doubt.

    Example:
        >>> needs_teacher({"name": "kd"}), needs_teacher({"name": "supervised"})
        (True, False)
        >>> needs_teacher([{"name": "supervised"}, {"name": "kd"}])
        True
    """
    settings = normalize_method(method)
    if not isinstance(settings, dict) or settings.get("name") not in METHODS:
        return True
    inner = inner_methods(settings)
    if inner:
        return any(needs_teacher(each) for _, each in inner)
    return _declares_teacher(METHODS[settings["name"]])


def describe_method(method: Any) -> str:
    """A method in a few words, for tables and headings.

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
    inner = inner_methods(settings)
    if name == "combined" and inner:
        text = " + ".join(_describe_weighted(each) for _, each in inner)
    else:
        text = f"{name} around {describe_method(inner[0][1])}" if inner else name
    more = [str(settings["preset"])] if settings.get("preset") else []
    if isinstance(settings.get("schedule"), dict):
        more.append(f"scheduled {', '.join(map(str, settings['schedule']))}")
    return f"{text} ({', '.join(more)})" if more else text


def _describe_weighted(settings: Any) -> str:
    factor = settings.get("factor", 1) if isinstance(settings, dict) else 1
    return describe_method(settings) if factor == 1 else f"{factor:g} {describe_method(settings)}"


@cache
def _declares_teacher(target: str) -> bool:
    """Whether the class behind a line of METHODS says ``needs = Needs(teacher=False)``, itself or by its base."""
    module, _, name = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    definition: ast.ClassDef | None = classes[name]
    while definition is not None:
        for call in (node.value for node in ast.walk(definition) if isinstance(node, ast.Assign) and _is_needs(node)):
            assert isinstance(call, ast.Call)
            teacher = next((keyword.value for keyword in call.keywords if keyword.arg == "teacher"), None)
            return not (isinstance(teacher, ast.Constant) and teacher.value is False)
        bases = [base.id for base in definition.bases if isinstance(base, ast.Name)]
        definition = next((classes[base] for base in bases if base in classes), None)
    return True


def _is_needs(node: ast.Assign) -> bool:
    """``needs = Requirements(...)`` or ``self.needs = Requirements(...)``."""
    target, call = node.targets[0], node.value
    named = getattr(target, "id", getattr(target, "attr", None)) == "needs"
    return named and isinstance(call, ast.Call) and getattr(call.func, "id", None) == "Requirements"
