"""What a method needs, read from its source: tables, help and pages want to know before anybody imports torch."""

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from potstill.methods import METHODS, create_method
from potstill.methods.catalog import REQUIRED, entry
from potstill.methods.needs import Needs

Place = tuple[str, ast.ClassDef]  # a module's name, and a class in it


@cache
def declared_needs(name: str) -> Needs | None:
    """The needs of a method with the default of each option; None where it has those of the methods inside it.

    Raises:
        UsageError: unknown name.
    """
    options = entry(name).options
    if is_around(name):
        return None
    module, _, class_name = METHODS[name].partition(":")
    values = {key: option.default for key, option in options.items() if option.default is not REQUIRED}
    for where, definition in lineage(module, class_name):
        for expression in _expressions(definition):
            try:
                found = eval(ast.unparse(expression), {"Needs": Needs, **_constants(where)}, values)  # nosec B307 # of our own source
            except NameError:  # it depends on more than options: the class itself must say
                found = create_method(name).needs
            assert isinstance(found, Needs)
            return found
    return Needs()


def declared_layers(name: str) -> tuple[str, ...]:
    """Submodules that a method's student must have, by path."""
    module, _, class_name = METHODS[name].partition(":")
    for where, definition in lineage(module, class_name):
        for node in definition.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "student_taps":
                return tuple(eval(ast.unparse(node.value), _constants(where)))  # nosec B307 # likewise
    return ()


def is_around(name: str) -> bool:
    """Whether a method works on other methods, which it takes as options."""
    return any("MethodSettings" in option.annotation for option in entry(name).options.values())


def lineage(module: str, class_name: str) -> Iterator[Place]:
    """The class and those of this package that it is made from, nearest first."""
    definition = next(
        (each for each in syntax(module).body if isinstance(each, ast.ClassDef) and each.name == class_name), None
    )
    if definition is None:
        return
    yield module, definition
    for base in definition.bases:
        if isinstance(base, ast.Name) and (where := home(module, base.id)):
            yield from lineage(where, base.id)


def home(module: str, name: str) -> str:
    """The module that a name in ``module`` comes from; "" where it is no module of this package."""
    for node in syntax(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return node.module if node.module.startswith("potstill.") else ""
    return module


def _expressions(definition: ast.ClassDef) -> Iterator[ast.expr]:
    """What a class assigns to its needs, in ``__init__`` or for itself."""
    for node in ast.walk(definition):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if value is not None and any(ast.unparse(target) in ("needs", "self.needs") for target in targets):
            yield value


def _constants(module: str) -> dict[str, Any]:
    """The module's names for plain values."""
    found = {}
    for node in syntax(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


@cache
def syntax(module: str) -> ast.Module:
    """A module's source, parsed."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
