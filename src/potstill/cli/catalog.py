"""Commands that list recipes, models and methods; the text of `potstill methods NAME`."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Annotated

import typer

from potstill.errors import UsageError, did_you_mean
from potstill.methods import (
    MethodInfo,
    StepCost,
    list_methods,
    list_own_methods,
    measured_costs,
    method_info,
    methods_by_kind,
    step_costs,
)
from potstill.options import REQUIRED, Option, allowed_values


def method_rows() -> list[tuple[str, str, str]]:
    """Return (name, kind, summary) of each method, sorted by kind; those of other packages come last."""
    rows = [(name, kind, method_info(name).summary) for kind, names in methods_by_kind().items() for name in names]
    for name in sorted({*list_methods()} - {*list_own_methods()}):
        try:
            info = method_info(name)
            rows.append((name, info.kind, info.summary))
        except UsageError as error:  # a broken package does not affect the other methods
            rows.append((name, "not loadable", str(error)))
    return rows


def method_text(name: str) -> str:
    """Return the text of `potstill methods NAME`.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    info, cost = method_info(name), step_costs().get(name)
    sections = [
        _wrapped(info.summary),
        _paper(info),
        _section("Loss", [_wrapped(_plain(info.loss), 2), *_rows(info.terms, wrap=False)]),
        _section(f"Needs ({info.kind})", [_wrapped(", ".join(info.needs), 2)]),
        _section("Options (method.NAME in a recipe)", _rows({k: _option_text(v) for k, v in info.options.items()})),
        _section("Presets (method.preset)", _rows({k: _settings_text(v) for k, v in info.presets.items()})),
        _section("Published top-1 of the student", _rows({k: f"{v:.2f} %" for k, v in info.published.items()})),
        _section("Price", [_wrapped(cost_text(cost), 2)] if cost else []),
        _section("Notes", [_wrapped(_plain(info.notes), 2)] if info.notes else []),
        _section("Traps", [f"  - {_wrapped(_plain(trap), 4).lstrip()}" for trap in info.traps]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _option_text(option: Option) -> str:
    default = "required" if option.default is REQUIRED else f"default {option.default}"
    return f"{allowed_values(option.schema)}, {default}: {_plain(option.doc)}"


def _settings_text(settings: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def cost_text(cost: StepCost) -> str:
    """Return time and memory of a training step, relative to those of the student alone, in one sentence."""
    facts = measured_costs()
    teacher = f", of which the teacher {cost.teacher:.2f}" if cost.teacher else ""
    adapters = f"; {cost.adapters:,} trained parameters beside the student's" if cost.adapters else ""
    return (
        f"a training step takes {cost.time:.2f} times as long as with labels alone (quartiles {cost.low:.2f} to "
        f"{cost.high:.2f}{teacher}) and {cost.memory:.2f} times the memory{adapters}. "
        f"{facts['teacher']} -> {facts['student']}, batches of {facts['batch']}, {facts['machine']['processor']}."
    )


def _paper(info: MethodInfo) -> str:
    paper = info.paper
    if paper is None:
        return ""
    return _wrapped(f'{paper.authors}, "{paper.title}", {paper.venue}.') + f"\n{paper.url}"


def _section(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _rows(rows: dict[str, str], *, wrap: bool = True) -> list[str]:
    """Return lines of two columns; long texts are wrapped inside the second."""
    width = max(map(len, rows), default=0)
    text_width = max(_width() - width - 4, 30)
    return [
        f"  {key:<{width}}  "
        + (f"\n{' ' * (width + 4)}".join(textwrap.wrap(text, text_width, break_on_hyphens=False)) if wrap else text)
        for key, text in rows.items()
    ]


def _wrapped(text: str, indent: int = 0) -> str:
    """Return the text with its paragraphs wrapped to the terminal's width."""
    return "\n".join(
        textwrap.fill(
            " ".join(paragraph.split()), _width(), initial_indent=" " * indent, subsequent_indent=" " * indent,
            break_on_hyphens=False, break_long_words=False,
        )
        for paragraph in text.split("\n\n")
    )  # fmt: skip


def _plain(text: str) -> str:
    return text.replace("``", "").replace("`", "")


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe's YAML.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for completion in editors.")
    ] = False,
) -> None:
    """List the recipes, print one, or print their JSON schema.

    For example: potstill recipes solar > mine.yaml
    """
    if schema:
        if name is not None:
            raise UsageError("--schema is the same for all recipes: leave the name out")
        from potstill.config.recipe import recipe_schema

        sys.stdout.write(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")
        return
    from potstill.config.recipe import list_recipes
    from potstill.config.yaml import parse_yaml

    known = list_recipes()
    if name is None:
        _columns({name: parse_yaml(path.read_text("utf-8"), name).value["description"] for name, path in known.items()})
        return
    if name not in known:
        raise UsageError(f"no recipe {name!r}{did_you_mean(name, known)}\nKnown: {', '.join(known)}")
    sys.stdout.write(known[name].read_text("utf-8"))


def models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help='Part of a name, or "resnet*".')] = "",
) -> None:
    """List the architectures."""
    from potstill.models.registry import list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no architecture matches {pattern!r}; `potstill models` lists all")
    sys.stdout.write("".join(f"{name}\n" for name in names))


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all about this method.")] = None,
) -> None:
    """List the methods by kind, or show one: paper, loss, needs, options, presets, published accuracies, price,
    traps.
    """
    if name is not None:
        sys.stdout.write(method_text(name))
        return
    rows = method_rows()
    names, kinds = (max(len(row[at]) for row in rows) for at in (0, 1))
    sys.stdout.write("".join(f"{name:<{names}}  {kind:<{kinds}}  {summary}\n" for name, kind, summary in rows))


def _columns(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    sys.stdout.write("".join(f"{key:<{width}}  {text}\n" for key, text in rows.items()))
