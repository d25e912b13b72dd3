"""Write the tables of the docs and the README that follow from the code, so that they cannot say anything else.

Usage: python scripts/docs_tables.py [--check]   ("--check" writes nothing and fails where a page is not up to date)

A table stands between ``<!-- begin: table NAME -->`` and ``<!-- end -->``; NAME is a key of TABLES.
"""

import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from potstill import errors
from potstill.artifacts import write_text
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.experiments.recipe import Recipe, StageSettings, list_recipes, load_recipe
from potstill.methods import METHODS
from potstill.methods.catalog import REQUIRED, entry
from potstill.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- begin: table (.+?) -->\n.*?<!-- end -->", re.DOTALL)
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
    """The members of a union; anything else alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def kind(annotation: Any) -> str:
    """One alternative for people."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        inner = PLAIN[arguments[0]]
        return f"list of {inner}s" if origin is list else f"{len(arguments)} {inner}s"
    if annotation in PLAIN:
        return PLAIN[annotation]
    return f"see [{annotation.__name__}](#{annotation.__name__.lower()})"


def meaning(field: FieldInfo) -> str:
    """The first sentence of a section's own docstring."""
    (section,) = [each for each in alternatives(field.annotation) if isinstance(each, type)]
    return (section.__doc__ or "").splitlines()[0]


def methods_table() -> str:
    """Name, summary and options of each method."""
    rows = []
    for name in METHODS:
        method = entry(name)
        options = [
            f"`{key}`: {option.allowed.replace('str', 'text')}, "
            + ("required" if option.default is REQUIRED else f"default {option.default}")
            for key, option in method.options.items()
        ]
        rows.append((f"`{name}`", " ".join(method.summary.split()), "; ".join(options) or "none"))
    return table(("method", "what it does", "options"), rows)


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
                f"`{recipe.teacher.model}` → `{recipe.student.model}`",
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
    return table(("exit code", "in Python", "meaning"), [*rows, ("130", "", "Interrupted (Ctrl-C).")])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "Recipe": lambda: settings_table(Recipe),
    "StageSettings": lambda: settings_table(StageSettings),
    "DataSettings": lambda: settings_table(DataSettings),
    "AugmentSettings": lambda: settings_table(AugmentSettings),
    "TrainingSettings": lambda: settings_table(TrainingSettings),
    "methods": methods_table,
    "recipes": recipes_table,
    "exit codes": exit_codes_table,
}


def filled(text: str) -> str:
    """A page with each of its tables made anew."""
    return BLOCK.sub(lambda m: f"<!-- begin: table {m[1]} -->\n\n{TABLES[m[1]]()}\n\n<!-- end -->", text)


def main() -> int:
    """Fill all pages; 1 where ``--check`` found one that is not up to date."""
    stale = [page for page in PAGES if filled(page.read_text("utf-8")) != page.read_text("utf-8")]
    for page in stale:
        if "--check" in sys.argv[1:]:
            sys.stderr.write(f"{page.relative_to(ROOT)} is not up to date: run python scripts/docs_tables.py\n")
        else:
            write_text(page, filled(page.read_text("utf-8")))
            sys.stdout.write(f"{page.relative_to(ROOT)}: written\n")
    return int("--check" in sys.argv[1:] and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
