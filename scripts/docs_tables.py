"""The tables of the documentation that follow from the code: settings, recipes, methods, exit codes."""

import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parent))
import method_pages

from potstill import errors
from potstill.config.recipe import (
    CurriculumSettings,
    DomainSettings,
    Recipe,
    StageSettings,
    TeachersSettings,
    list_recipes,
    load_recipe,
)
from potstill.data import AugmentSettings, DataSettings
from potstill.distillation.teacher_cache import TeacherCacheSettings
from potstill.loggers import LoggerSettings
from potstill.training.settings import TrainingSettings

PLAIN = {int: "whole number", float: "number", bool: "true, false", str: "text", type(None): "null"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def settings_table(model: type[BaseModel]) -> str:
    """Key, default, what is allowed, what it means."""
    rows = [
        (f"`{name}`", default(field), allowed(field), field.description or meaning(field))
        for name, field in model.model_fields.items()
    ]
    return table(("key", "default", "allowed", "what it is"), rows)


def default(field: FieldInfo) -> str:
    """As it is written in YAML."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`" if field.default != "" else '`""`'


def allowed(field: FieldInfo) -> str:
    """Kinds and bounds: "whole number ≥ 1 and ≤ 100,000"."""
    kinds = [kind(each) for each in alternatives(field.annotation)]
    bounds = [
        f"{sign} {getattr(each, name):,}"
        for each in field.metadata
        for name, sign in SIGNS.items()
        if getattr(each, name, None) is not None
    ]
    return " or ".join([" ".join(filter(None, [kinds[0], " and ".join(bounds)])), *kinds[1:]])


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, also of one inside another; anything else alone."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for each in typing.get_args(annotation) for member in alternatives(each)]
    return [annotation]


def kind(annotation: Any) -> str:
    """One alternative for people."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        inner = PLAIN.get(arguments[0])
        if origin is tuple:
            return f"{len(arguments)} {inner}s"
        return f"list of {inner}s" if inner else f"list of {kind(arguments[0])}"
    if annotation in PLAIN:
        return PLAIN[annotation]
    return f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def meaning(field: FieldInfo) -> str:
    """The first sentence of a section's own docstring."""
    (section,) = [each for each in alternatives(field.annotation) if isinstance(each, type)]
    return (section.__doc__ or "").splitlines()[0]


def methods_table() -> str:
    """Every method with its paper, needs and price."""
    head, *rows = method_pages.table_of_methods()
    return table(head, rows)


def recipes_table() -> str:
    """Name, description and networks of each shipped recipe."""
    rows = []
    for name in list_recipes():
        recipe = load_recipe(name, data_needed=False)
        epochs = "{} / {}".format(*(recipe.stage_training(stage).epochs for stage in ("teacher", "student")))
        rows.append(
            (
                f"`{name}`",
                recipe.description,
                f"{', '.join(f'`{each.model}`' for each in recipe.teacher_list)} → `{recipe.student.model}`",
                f"{recipe.data.size} px",
                epochs,
            )
        )
    return table(("recipe", "what it is", "teacher → student", "images", "epochs, teacher / student"), rows)


def exit_codes_table() -> str:
    """Every error class with its exit code."""
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    rows = [("0", "", "All went well.")]
    rows += [
        (str(each.exit_code), f"`{each.__name__}`", "A bug in potstill." if each.exit_code == 1 else each.__doc__ or "")
        for each in sorted(kinds, key=lambda each: each.exit_code)
    ]
    return table(
        ("exit code", "in Python", "meaning"),
        [
            *rows,
            (
                "130, 143",
                "",
                "Ctrl-C (SIGINT), SIGTERM. A training finishes its step and saves; a second signal ends it at once.",
            ),
        ],
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "Recipe": lambda: settings_table(Recipe),
    "StageSettings": lambda: settings_table(StageSettings),
    "DomainSettings": lambda: settings_table(DomainSettings),
    "TeachersSettings": lambda: settings_table(TeachersSettings),
    "DataSettings": lambda: settings_table(DataSettings),
    "AugmentSettings": lambda: settings_table(AugmentSettings),
    "CurriculumSettings": lambda: settings_table(CurriculumSettings),
    "LoggerSettings": lambda: settings_table(LoggerSettings),
    "TeacherCacheSettings": lambda: settings_table(TeacherCacheSettings),
    "TrainingSettings": lambda: settings_table(TrainingSettings),
    "methods": methods_table,
    "method prices": method_pages.measured_on,
    "recipes": recipes_table,
    "exit codes": exit_codes_table,
}
