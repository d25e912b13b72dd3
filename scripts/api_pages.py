"""The API reference: Markdown from signatures and docstrings of what the package offers to its users."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from potstill import errors, functional
from potstill.methods.documentation import tex_to_text

_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_MATH_BLOCK = re.compile(r"^ *\.\. math::(.*?)(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Note|Traps):$")
_ITEM = re.compile(r"([\w*.]+(?:, [\w*.]+)*): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One page of the reference."""

    title: str
    introduction: str
    entries: tuple[str, ...]  # "module:attribute"; written as potstill.attribute where the package exports it


PAGES = {
    "experiment": Page(
        "Experiments",
        "Run a whole experiment, load a trained model, predict. The commands `potstill run`, `predict` and `evaluate` "
        "call these functions. The run folder that they write is described in [Run folder](../run-folder.md).",
        (
            "potstill.api:run",
            "potstill.api:fit",
            "potstill.api:shrink",
            "potstill.api:load",
            "potstill.export.predict:predict",
            "potstill.export.predict:Prediction",
            "potstill.export.evaluate:evaluate",
            "potstill.models.model_file:Classifier",
            "potstill.training.callbacks:Observer",
        ),
    ),
    "distiller": Page(
        "Distiller and methods",
        "Distil in a training loop of your own. Every method class (`potstill.KD`, `potstill.DKD`, ...) is exported by "
        "the package; its options are on the [page of the method](../methods.md).",
        (
            "potstill.distillation.distiller:Distiller",
            "potstill.methods:create_method",
            "potstill.methods:list_methods",
            "potstill.models.factory:create_model",
            "potstill.models.registry:list_models",
            "potstill.models.registry:input_spec",
            "potstill.input_spec:InputSpec",
            "potstill.types:Step",
            "potstill.types:Batch",
            "potstill.types:Outputs",
            "potstill.methods.base:Method",
            "potstill.methods:Requirements",
        ),
    ),
    "data": Page(
        "Data",
        "Load data sets, pass data sets of your own, validate images and splits. The settings are those of "
        "[`data` in a recipe](../recipes.md#datasettings).",
        (
            "potstill.data.datasets:from_torch",
            "potstill.data.datasets:load_data",
            "potstill.data.splits:DataSplits",
            "potstill.data.validation.validate:validate_data",
            "potstill.data.validation:ValidationReport",
        ),
    ),
    "functional": Page(
        "Losses",
        "`potstill.functional`: the losses of all methods as pure functions of tensors. Letters in shapes: B batch "
        "size, K classes, C channels, H and W height and width of a feature map, D size of an embedding. Where an "
        "entry says nothing else, a loss is a scalar of at least 0, the mean over the batch, in at least float32; "
        "labels are int64 [B] class ids; `Positive` is above 0, `NonNegative` at least 0, `Share` from 0 to 1, "
        "`Count` 1 or more; no gradient reaches what comes from a teacher. Numbers out of range, unequal shapes, "
        "and a batch of one image where images are compared, raise `UsageError`.",
        tuple(f"potstill.functional:{name}" for name in functional.__all__),
    ),
    "errors": Page(
        "Errors",
        "Every error that a user can correct is a `PotstillError`, with a message to show and an "
        "[exit code](../exit-codes.md).",
        tuple(
            f"potstill.errors:{name}"
            for name, kind in vars(errors).items()
            if isinstance(kind, type) and issubclass(kind, BaseException)
        ),
    ),
}


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    return {f"api/{name}.md": page(each) for name, each in PAGES.items()}


def navigation() -> list[str]:
    """The pages as lines of zensical.toml."""
    return [f'{{ "{each.title}" = "api/{name}.md" }}' for name, each in PAGES.items()]


def page(found: Page) -> str:
    """One page: title, introduction, entries."""
    parts = [f"# {found.title}", found.introduction]
    for entry in found.entries:
        parts += _entry(entry)
    return "\n\n".join(parts) + "\n"


def _entry(entry: str) -> Iterator[str]:
    module, _, name = entry.partition(":")
    value = getattr(importlib.import_module(module), name)
    exported = name in importlib.import_module("potstill").__all__
    yield f"## {name}"
    yield f"```python\nfrom {'potstill' if exported else module} import {name}\n```"
    yield f"```py\n{signature(value)}\n```"  # no code to run, unlike blocks of "python"
    yield docstring(value)
    if inspect.isclass(value):
        for key, member in vars(value).items():
            inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(inner) and inspect.getdoc(inner):
                decorator = "@property\n" if isinstance(member, property) else ""
                yield f"### {name}.{key}"
                yield f"```py\n{decorator}{signature(inner)}\n```"
                yield docstring(inner)


def signature(value: Any) -> str:
    """The signature as the source has it; of a dataclass its fields with their comments."""
    # Wrapped by a decorator, a function still has its own source.
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))
    (node,) = ast.parse(source).body
    if isinstance(node, ast.FunctionDef):
        return _call(node.name, node, method=bool(node.args.args) and node.args.args[0].arg in ("self", "cls"))
    assert isinstance(node, ast.ClassDef)
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return _call(f"class {node.name}", inner, method=True)
    bases = f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    lines = source.splitlines()
    fields = [
        line
        for inner in node.body
        if isinstance(inner, ast.AnnAssign)
        for line in lines[inner.lineno - 1 : inner.end_lineno]
        if not line.strip().startswith("_")
    ]
    return "\n".join([f"class {node.name}{bases}:" if fields else f"class {node.name}{bases}", *fields])


def _call(name: str, node: ast.FunctionDef, *, method: bool) -> str:
    arguments = _arguments(node.args)[int(method) :]
    result = f" -> {_annotation(node.returns)}" if node.returns is not None and not name.startswith("class ") else ""
    line = f"{name}({', '.join(arguments)}){result}"
    return line if len(line) <= 90 else "\n".join([f"{name}(", *(f"    {each}," for each in arguments), f"){result}"])


def _arguments(given: ast.arguments) -> list[str]:
    """Each argument with type and default."""
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    found = [_argument(each, default) for each, default in zip(plain, defaults, strict=True)]
    if given.vararg:
        found.append(f"*{_argument(given.vararg, None)}")
    elif given.kwonlyargs:
        found.append("*")
    found += [_argument(each, default) for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*found, f"**{_argument(given.kwarg, None)}"] if given.kwarg else found


def _argument(given: ast.arg, default: ast.expr | None) -> str:
    text = f"{given.arg}: {_annotation(given.annotation)}" if given.annotation else given.arg
    if default is None:
        return text
    equals = " = " if given.annotation else "="
    return f"{text}{equals}" + ast.unparse(default).replace("'", '"')


def _annotation(node: ast.expr) -> str:
    """A type as written, without the quotes of one that is imported for type checkers only."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def docstring(value: Any) -> str:
    """A docstring in Google's style as Markdown."""
    blocks: list[str] = []
    heading, lines = "", []
    for line in [*(inspect.getdoc(value) or "").splitlines(), "End:"]:
        found = _HEADING.match(line)
        if found or line == "End:":
            blocks += _section(heading, textwrap.dedent("\n".join(lines)).strip("\n"))
            heading, lines = found[1] if found else "", []
        else:
            lines.append(line)
    return "\n\n".join(blocks)


def _section(heading: str, text: str) -> list[str]:
    if not text.strip():
        return []
    if heading == "Example":
        return ["**Example**", f"```pycon\n{text}\n```"]
    if heading in ("Args", "Attributes", "Raises"):
        return [f"**{'Arguments' if heading == 'Args' else heading}**", "\n".join(_items(text))]
    return [f"**{heading}**", _prose(text)] if heading else [_prose(text)]


def _items(text: str) -> Iterator[str]:
    """A list of "name: what it is", each in one line."""
    for item in re.split(r"\n(?=\S)", text):
        found = _ITEM.match(item)
        yield f"- `{found[1].replace(', ', '`, `')}`: {_prose(found[2])}" if found else f"- {_prose(item)}"


def _prose(text: str) -> str:
    """Paragraphs on one line each; formulas as text; lists stay lists."""
    text = _MATH_BLOCK.sub(lambda match: f"`{tex_to_text(' '.join(match[1].split()))}`", text)
    text = _MATH_ROLE.sub(lambda match: f"`{tex_to_text(match[1])}`", text).replace("``", "`")
    paragraphs = [re.sub(r"\n(?!- )\s*", " ", paragraph.strip()) for paragraph in re.split(r"\n\s*\n", text)]
    return "\n\n".join(re.sub(r"  +", " ", paragraph) for paragraph in paragraphs)
