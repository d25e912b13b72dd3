"""Commands that list recipes, models and methods; the text of `potstill methods NAME`."""

import enum
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from potstill.errors import UsageError, did_you_mean
from potstill.formatting import format_columns, format_milliseconds, format_scaled
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

if TYPE_CHECKING:
    from potstill.models.model_table import ModelRow


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
    """Return the text of `potstill methods NAME`."""
    info, cost = method_info(name), step_costs().get(name)
    sections = [
        _wrapped(info.summary),
        _paper(info),
        _section("Loss", [_wrapped(_plain(info.loss), 2), *_rows(info.terms, wrap=False)]),
        _section(f"Needs ({info.kind})", [_wrapped(", ".join(info.needs), 2)]),
        _section("Options (method.NAME in a recipe)", _rows({k: _option_text(v) for k, v in info.options.items()})),
        _section(
            "Presets (method.preset)",
            _rows({k: ", ".join(f"{key}={value}" for key, value in v.items()) for k, v in info.presets.items()}),
        ),
        _section("Published top-1 of the student", _rows({k: f"{v:.2f} %" for k, v in info.published.items()})),
        _section("Price", [_wrapped(cost_text(cost), 2)] if cost else []),
        _section("Notes", [_wrapped(_plain(info.notes), 2)] if info.notes else []),
        _section("Traps", [f"  - {_wrapped(_plain(trap), 4).lstrip()}" for trap in info.traps]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _option_text(option: Option) -> str:
    default = "required" if option.default is REQUIRED else f"default {option.default}"
    return f"{allowed_values(option.schema)}, {default}: {_plain(option.doc)}"


def cost_text(cost: StepCost) -> str:
    """Return time and memory of a training step, relative to those of the student alone, in one sentence."""
    facts = measured_costs()
    machine = cost.machine or facts["machine"]
    teacher = f", of which the teacher {cost.teacher:.2f}" if cost.teacher else ""
    adapters = f"; {cost.adapters:,} trained parameters beside the student's" if cost.adapters else ""
    return (
        f"a training step takes {cost.time:.2f} times as long as with labels alone (quartiles {cost.low:.2f} to "
        f"{cost.high:.2f}{teacher}) and {cost.memory:.2f} times the memory{adapters}. "
        f"{facts['teacher']} -> {facts['student']}, batches of {facts['batch']}, {machine['processor']}."
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
        parsed = {name: parse_yaml(path.read_text("utf-8"), name).value for name, path in known.items()}
        _print_columns([(name, value["description"]) for name, value in parsed.items()])
        return
    if name not in known:
        raise UsageError(f"no recipe {name!r}{did_you_mean(name, known)}\nKnown: {', '.join(known)}")
    sys.stdout.write(known[name].read_text("utf-8"))


class Order(enum.StrEnum):
    """Columns by which `models` sorts."""

    latency = "latency"
    parameters = "parameters"
    size = "size"
    multiply_adds = "multiply-adds"


def models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help='Part of a name, or "resnet*".')] = "",
    under: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="Only networks below these: 5ms, 2MB or 5ms,2MB (one image; ONNX file)."),
    ] = None,
    sort: Annotated[Order | None, typer.Option(help="Sort by this, the smallest first.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compare the file in int8 with the limit, not float32.")] = False,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", min=1, help="Height and width of the images.  [default: each network's own]"),
    ] = None,
    classes: Annotated[int | None, typer.Option(metavar="K", min=2, help="Number of classes.  [default: 10]")] = None,
) -> None:
    """List the architectures; with --under or --sort, a table of their size and estimated latency."""
    from potstill.models.registry import list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no architecture matches {pattern!r}; `potstill models` lists all")
    if under is None and sort is None:
        if int8 or image_size is not None or classes is not None:
            raise UsageError("--int8, --image-size and --classes are for the table of sizes: add --sort or --under")
        sys.stdout.write("".join(f"{name}\n" for name in names))
        return
    from potstill.models.model_table import REFERENCE, REFERENCE_SIZE, TABLE_CLASSES, Limits, parse_limits, read_table

    limits = parse_limits(under) if under is not None else Limits()
    classes = TABLE_CLASSES if classes is None else classes
    known = set(names)
    rows = [row for row in read_table() if row.name in known]
    if not rows:
        raise UsageError(f"the table of sizes has none of {', '.join(names[:3])}; leave --under and --sort out")
    from potstill.evaluation.cost import measure_reference
    from potstill.report.text_reports import aligned_table

    reference = measure_reference()
    times = {row.name: row.milliseconds(reference, image_size) for row in rows}
    excess = {row.name: limits.excess(times[row.name], row.file_size(classes, int8=int8)) for row in rows}
    fitting = [row for row in rows if excess[row.name] <= 1]
    if not fitting:
        nearest = min(rows, key=lambda row: excess[row.name])
        raise UsageError(
            f"no network{f' that matches {pattern!r}' if pattern else ''} is below {limits}.\nNearest: {nearest.name}, "
            f"{format_milliseconds(times[nearest.name])} and "
            f"{format_scaled(nearest.file_size(classes, int8=int8), 'B')} (estimated)"
        )
    pixels = {row.name: (1 if image_size is None else (image_size / row.size) ** 2) for row in rows}
    keys: dict[Order, Callable[[ModelRow], float]] = {
        Order.latency: lambda row: float("inf") if times[row.name] is None else float(times[row.name] or 0.0),
        Order.parameters: lambda row: row.parameters_with(classes),
        Order.size: lambda row: row.file_size(classes, int8=int8),
        Order.multiply_adds: lambda row: row.multiply_adds * pixels[row.name],
    }
    fitting.sort(key=keys[sort or Order.latency])
    head = ["", "pixels", "parameters", "multiply-adds", "float32", "int8", "latency"]
    cells = [
        [
            row.name,
            str(image_size or row.size),
            format_scaled(row.parameters_with(classes)),
            format_scaled(row.multiply_adds * pixels[row.name]),
            format_scaled(row.file_size(classes), "B"),
            format_scaled(row.file_size(classes, int8=True), "B"),
            format_milliseconds(times[row.name]),
        ]
        for row in fitting
    ]
    sys.stdout.write(f"{aligned_table([head, *cells])}\n")
    unknown = sum(times[row.name] is None for row in rows)
    left_out = f"; {unknown} networks whose latency was not measured are left out" if limits.milliseconds else ""
    sys.stderr.write(
        f"{len(fitting)} networks with {classes} classes{left_out}\n"
        f"latency and file sizes are estimated: one image on one thread, from {REFERENCE} at {REFERENCE_SIZE} px, "
        f"which takes {format_milliseconds(reference)} here\n"
    )


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all about this method.")] = None,
) -> None:
    """List the methods by kind, or show one: paper, loss, needs, options, presets, accuracies, price and traps."""
    if name is not None:
        sys.stdout.write(method_text(name))
        return
    rows = method_rows()
    _print_columns(rows)


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with the last cell wrapped to the terminal's width; piped, each row is one line, for grep."""
    heads = format_columns([row[:-1] for row in rows], left=range(3))
    start = max(map(len, heads)) + 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1_000_000
    width = max(columns - start, 20)
    texts = (f"\n{' ' * start}".join(textwrap.wrap(row[-1], width, break_on_hyphens=False)) for row in rows)
    sys.stdout.write("".join(f"{head:<{start}}{text}\n" for head, text in zip(heads, texts, strict=True)))
