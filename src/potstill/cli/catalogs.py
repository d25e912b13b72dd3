"""Verbs that show what there is: recipes, models, methods."""

import sys
from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe's YAML.")] = None,
) -> None:
    """List the recipes, or print one to change.

    For example: potstill recipes solar > mine.yaml
    """
    from potstill.errors import UsageError, nearest
    from potstill.experiments.recipe import list_recipes
    from potstill.experiments.recipe_yaml import read

    known = list_recipes()
    if name is None:
        _columns({name: read(path.read_text("utf-8"), name).value["description"] for name, path in known.items()})
        return
    if name not in known:
        raise UsageError(f"no recipe {name!r}{nearest(name, known)}\nKnown: {', '.join(known)}")
    sys.stdout.write(known[name].read_text("utf-8"))


def models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help='Part of a name, or "resnet*".')] = "",
) -> None:
    """List the architectures, for teacher and student."""
    from potstill.errors import UsageError
    from potstill.models.names import list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no architecture matches {pattern!r}; `potstill models` lists all")
    sys.stdout.write("".join(f"{name}\n" for name in names))


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all about this method.")] = None,
) -> None:
    """List the methods by kind, or show one: paper, loss, needs, options, presets, published figures, price, traps."""
    from potstill.cli.method_text import list_text, method_text

    if name is not None:
        sys.stdout.write(method_text(name))
        return
    rows = list_text()
    names, kinds = (max(len(row[at]) for row in rows) for at in (0, 1))
    sys.stdout.write("".join(f"{name:<{names}}  {kind:<{kinds}}  {summary}\n" for name, kind, summary in rows))


def _columns(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    sys.stdout.write("".join(f"{key:<{width}}  {text}\n" for key, text in rows.items()))
