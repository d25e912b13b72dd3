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
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this method's options.")] = None,
) -> None:
    """List the methods, or show one with its options."""
    from potstill.methods import list_methods
    from potstill.methods.catalog import REQUIRED, entry

    if name is None:
        _columns({name: entry(name).summary for name in list_methods()})
        return
    method = entry(name)
    sections = [method.summary, method.paper, method.doc.split("\n\nArgs:")[0] if method.doc else ""]
    sys.stdout.write("\n\n".join(text for text in sections if text) + "\n")
    if method.options:
        sys.stdout.write("\nOptions (method.NAME in a recipe):\n")
        _columns(
            {
                f"  {key}": f"{option.allowed}, "
                + ("required" if option.default is REQUIRED else f"default {option.default}")
                for key, option in method.options.items()
            }
        )


def _columns(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    sys.stdout.write("".join(f"{key:<{width}}  {text}\n" for key, text in rows.items()))
