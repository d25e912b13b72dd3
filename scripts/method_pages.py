"""A page for each method, its entry in the navigation, and the table of methods: all from the methods' source."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from potstill.cli.catalog import cost_text
from potstill.config.recipe import list_recipes
from potstill.methods import (
    MethodInfo,
    Requirements,
    list_own_methods,
    measured_costs,
    method_info,
    methods_by_kind,
    step_costs,
)
from potstill.options import REQUIRED, Option, allowed_values

_PAIR = "cifar100/resnet32x4-resnet8x4"  # the one that every table has

TWO_HEADS = "deit_tiny_distilled_patch16_224"  # a student for methods that want one with a second head

# What goes without saying in a table of few words.
_COMMON = {"teacher", "epoch progress", "labels of every image", "two images a batch or more", "number of classes",
           "average pooling before the head"}  # fmt: skip


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    return {f"methods/{name}.md": page(name) for name in list_own_methods()}


def navigation() -> list[str]:
    """The pages by kind as lines of zensical.toml."""
    lines = []
    for kind, names in methods_by_kind().items():
        if names:
            listed = ", ".join(f'{{ "{name}" = "methods/{name}.md" }}' for name in names)
            lines.append(f'{{ "{kind.capitalize()}" = [{listed}] }}')
    return lines


def table_of_methods() -> list[tuple[str, ...]]:
    """Head and rows, with links to the pages of the methods."""
    rows: list[tuple[str, ...]] = [("method", "paper", "needs", "time", "memory")]
    for names in methods_by_kind().values():
        rows += [_row(method_info(name)) for name in names]
    return rows


def _row(found: MethodInfo) -> tuple[str, ...]:
    name = found.name
    title = found.summary.partition(":")[0].strip(" .")
    paper = f"[{found.paper.venue}]({found.paper.url})" if found.paper else ""
    needs = ", ".join(need for need in found.needs if need not in _COMMON) or "logits"
    cost = step_costs().get(name)
    price = (f"{cost.time:.2f}", f"{cost.memory:.2f}") if cost else ("", "")
    return (f"[`{name}`](methods/{name}.md) {title}", paper, needs, *price)


def page(name: str) -> str:
    """The page of one method."""
    found = method_info(name)
    parts = [f"# {name}", _head(found), *_loss(found), f"**Needs**: {', '.join(found.needs)}."]
    parts += ["## Use", f"```yaml\n{recipe(found)}```", *_command(found), f"```python\n{snippet(name)}```"]
    if found.options:
        parts += ["## Options", _options(found.options)]
    if found.presets:
        presets = [(f"`{key}`", _settings(value)) for key, value in found.presets.items()]
        parts += ["## Presets", "The authors' options for one pair of networks, for `method.preset`.",
                  _table(("preset", "options"), presets)]  # fmt: skip
    if found.published:
        published = [(_words(key), f"{value:.2f}") for key, value in found.published.items()]
        parts += ["## Published", "Top-1 of the student in percent, as published; measured elsewhere, not here.",
                  _table(("teacher → student", "top-1"), published)]  # fmt: skip
    parts += ["## Price", _price(found)]
    if found.notes:
        parts += ["## Notes", _prose(found.notes)]
    if found.traps:
        parts += ["## Traps", "\n".join(f"- {_prose(trap)}" for trap in found.traps)]
    return "\n\n".join(parts) + "\n"


def recipe(found: MethodInfo) -> str:
    """The method's part of a recipe, every option at its default."""
    options = {key: each.default for key, each in found.options.items()} | found.examples
    text: str = yaml.safe_dump(
        {"method": {"name": found.name, **options}}, sort_keys=False, default_flow_style=None, width=100
    )
    if text.startswith("method: {"):  # few options fit into one line, but the others are written so
        text = yaml.safe_dump({"method": {"name": found.name, **options}}, sort_keys=False)
    return text


def snippet(name: str) -> str:
    """A loop of one step, with all that the method needs."""
    needs = method_info(name).requirements or Requirements(epoch=True)  # around others: these may be anything
    student = TWO_HEADS if "head_dist" in method_info(name).student_layers else "cifar/resnet8"
    given = method_info(name).examples.items()
    method = ", ".join([f'"{name}"', *(f"{key}={json.dumps(value)}" for key, value in given)])
    return "".join(f"{line}\n" for line in _lines(needs, method, student))


def _lines(needs: Requirements, method: str, student: str) -> Iterator[str]:
    extra = ""
    yield "import torch"
    yield "from potstill import Distiller, create_method, create_model"
    if needs.prepare:
        yield "from potstill.types import Batch"
    yield ""
    yield f'student = create_model("{student}", 10, size=32)'
    if needs.members:
        yield 'teacher = [create_model(f"cifar/{name}", 10, size=32) for name in ("resnet14", "resnet20")]  # trained'
    elif needs.teacher:
        yield 'teacher = create_model("cifar/resnet20", 10, size=32)  # yours, trained'
    yield "images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 10"
    teacher = "teacher" if needs.teacher else "None"
    arguments = f"student, {teacher}, create_method({method}), example=images"
    if needs.index:
        yield "index, train_labels = torch.arange(8), labels  # sample ids; the label of every training image"
        arguments, extra = f"{arguments}, train_labels=train_labels", f"{extra}, index=index"
    if needs.batch_size:
        arguments += ", batch_size=8"
    if needs.second != "none":
        what = "another view of each image" if needs.second == "strong" else "for each image another of its class"
        yield f"second = torch.randn(8, 3, 32, 32)  # {what}"
        extra += ", second=second"
    yield ""
    line = f"distiller = Distiller({arguments})"
    yield from [line] if len(line) <= 120 else ["distiller = Distiller(", f"    {arguments}", ")"]
    if needs.prepare:
        yield "distiller.prepare(lambda: iter([Batch(images, labels)]))  # passes over the training images"
    if needs.epoch:
        yield "distiller.start_epoch(0, epochs=100)  # before each epoch"
    yield f"step = distiller(images, labels{extra})"
    yield "step.loss.backward()  # then an optimizer's step on distiller.trained_parameters()"
    yield "print({name: term.item() for name, term in step.terms.items()})"


def _head(found: MethodInfo) -> str:
    text = _prose(found.summary)
    if found.paper is None:
        return text
    paper = found.paper
    return f"{text}\n\n{paper.authors}, [{paper.title}]({paper.url}), {paper.venue}."


def _loss(found: MethodInfo) -> list[str]:
    parts = ["## Loss", _prose(found.loss)]
    if found.terms:
        width = max(map(len, found.terms))
        rows = "\n".join(f"{key:<{width}}  {text}" for key, text in found.terms.items())
        parts += [f"```text\n{rows}\n```"]
    return parts


def _command(found: MethodInfo) -> list[str]:
    """With a preset, on the pair of networks that it is for, where a recipe for that pair ships."""
    name, shipped = found.name, list_recipes()
    if found.examples or found.kind == "several teachers":
        return []
    pairs = [key for key in (_PAIR, *found.presets) if key in found.presets and key in shipped]
    pair = next(iter(pairs), None)
    if pair is None:
        networks = "--teacher cifar/resnet14" + (
            f" --student {TWO_HEADS}" if "head_dist" in method_info(name).student_layers else ""
        )
        return [f"```sh\npotstill run quickstart {networks} --set method.name={name}\n```"]
    return [f"```sh\npotstill run {pair} --set method.name={name} --set method.preset={pair}\n```"]


def _options(options: dict[str, Option]) -> str:
    rows = []
    for key, each in options.items():
        default = "required" if each.default is REQUIRED else str(each.default)
        rows.append((f"`{key}`", _code(default), allowed_values(each.schema), _prose(each.doc)))
    return _table(("option", "default", "allowed", "what it is"), rows)


def _price(found: MethodInfo) -> str:
    price = step_costs().get(found.name)
    if price is None:
        return "Not measured yet."
    return cost_text(price)[:1].upper() + cost_text(price)[1:] + " [How](../methods.md#price)."


def measured_on() -> str:
    """The machine and the networks of the measured prices, in one paragraph."""
    facts = measured_costs()
    if not facts:
        return "Not measured yet."
    machine, plain = facts["machine"], facts["plain"]
    return (
        f"Measured with `{facts['teacher']}` → `{facts['student']}`, batches of {facts['batch']} images of "
        f"{facts['size']} px and {facts['classes']} classes, on {machine['processor']} ({machine['threads']} threads, "
        f"torch {machine['torch']}), {facts['rounds']} rounds. A step on labels alone took "
        f"{plain['seconds']:.2f} s and {plain['mebibytes']:,.0f} MiB; running the teacher on one batch takes "
        f"{plain['teacher']:.2f} of such a step."
    )


def _words(pair: str) -> str:
    data, _, networks = pair.partition("/")
    return f"{data}: {networks.replace('-', ' → ')}" if networks else data


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in settings.items())


def _code(default: str) -> str:
    return default if default == "required" else f"`{default}`"


def _prose(text: str) -> str:
    """Paragraphs on one line each, one space between sentences."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.replace("``", "`").split("\n\n"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
