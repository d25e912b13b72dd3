"""Documentation of methods, read from their classes and docstrings; importing the classes takes the seconds of torch.

Formulas of docstrings, which are TeX, become plain text.  ``python -m potstill.methods.documentation`` writes
``catalog.json``, from which all that is built in is known without torch.
"""

import dis
import importlib
import inspect
import json
import pkgutil
import re
import sys
import textwrap
import types
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from potstill import methods
from potstill.errors import UsageError
from potstill.io import write_text
from potstill.methods import CATALOG_FILE, PUBLISHED_FILE, MethodInfo, Paper, source_digest, takes_methods
from potstill.methods.base import Method
from potstill.methods.requirements import Requirements
from potstill.options import REQUIRED, example_values

_PAPER = re.compile(
    r'(?P<authors>[^":(]+), "(?P<title>[^"]+)",\s+(?P<venue>[^.]*[^.\s])\.?\s+(?P<url>https?://\S+)\s*(?P<rest>.*)',
    re.DOTALL,
)
_MATH = re.compile(r"\.\. math::(.*?)(?=\n\s*\n|\Z)", re.DOTALL)
_FOLDER = "potstill.methods."


def build_catalog() -> dict[str, Any]:
    """Return what the classes of this folder declare, as plain values."""
    found: dict[str, Any] = {}
    functions: dict[str, str] = {}
    for each in pkgutil.iter_modules(methods.__path__, _FOLDER):
        module = importlib.import_module(each.name)
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        classes = [
            value
            for value in own
            if inspect.isclass(value) and issubclass(value, Method) and bool(vars(value).get("name"))
        ]
        for kind in classes:
            if kind.name in found:
                raise TypeError(f"{found[kind.name]['target']} and {kind.__module__}:{kind.__name__} have one name")
            info = describe(kind, kind.name)
            found[kind.name] = asdict(info) | {
                "options": {key: _changed(option) for key, option in info.options.items()},
                "requirements": None if info.requirements is None else _changed(info.requirements),
            }
        if classes:
            named = [value for value in own if inspect.isfunction(value) and not value.__name__.startswith("_")]
            shown = [value for value in named if value.__name__.endswith("_loss") or ">>>" in (value.__doc__ or "")]
            functions |= {value.__name__: module.__name__ for value in shown}
    ordered = dict(sorted(found.items()))
    return {"digest": source_digest(), "methods": ordered, "functions": dict(sorted(functions.items()))}


def catalog_files() -> dict[Path, str]:
    """The files that this module writes, with their text: the catalog, and the types of ``potstill.functional``."""
    catalog = build_catalog()
    lines = [
        f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in catalog["methods"].items()
    ]
    rest = {key: value for key, value in catalog.items() if key != "methods"}
    # A line a method, so that changes can be read.
    text = json.dumps(rest)[:-1] + ', "methods": {\n' + ",\n".join(lines) + "\n}}\n"
    imports = [f"from {module} import {name} as {name}" for name, module in catalog["functions"].items()]
    types = ["# Written by python -m potstill.methods.documentation", *sorted(imports)]
    return {CATALOG_FILE: text, CATALOG_FILE.parents[1] / "functional.pyi": "\n".join(types) + "\n"}


def write_catalog() -> None:
    """Bring the files up to date with the source."""
    for path, text in catalog_files().items():
        write_text(path, text)


def _changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    return {
        field.name: item
        for field in fields(value)
        if (item := getattr(value, field.name)) is not REQUIRED and item != field.default
    }


def describe(kind: type[Method], name: str) -> MethodInfo:
    """Return everything that is to be known of a method by this name."""
    module = sys.modules[kind.__module__]
    summary, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n")
    paper, notes = _parse_citation(rest.strip())
    notes, traps = _split_traps(notes)
    loss, more = _split_traps((kind.__doc__ or "").partition("\n\nArgs:\n")[0])
    needs = _requirements(kind)
    return MethodInfo(
        name=name,
        target=f"{kind.__module__}:{kind.__qualname__}",
        summary=summary or loss.partition("\n")[0],
        kind=_method_kind(needs),
        paper=paper,
        notes=notes,
        loss=loss,
        terms=_loss_terms(kind),
        options=dict(kind.OPTIONS),
        presets=dict(kind.PRESETS),
        published=json.loads(PUBLISHED_FILE.read_text(encoding="utf-8")).get(name, {}),
        requirements=needs,
        student_layers=tuple(kind.student_taps),
        traps=(*traps, *more, *(_traps_from_requirements(needs) if needs else ())),
    )


def _requirements(kind: type[Method]) -> Requirements | None:
    """The needs with the default of each option; None if they are those of the methods inside it."""
    if any(takes_methods(option) for option in kind.OPTIONS.values()):
        return None
    try:
        return kind(**example_values(kind.OPTIONS)).needs
    except UsageError:  # the class is pickier than its options' schemas
        return kind.needs


def _method_kind(needs: Requirements | None) -> str:
    if needs is None:
        return "around other methods"
    if needs.peers:
        return "peers"
    if not needs.teacher:
        return "no teacher"
    if needs.members:
        return "several teachers"
    if needs.maps != "none":
        return "feature maps"
    return "embeddings" if needs.embedding else "logits"


def _parse_citation(text: str) -> tuple[Paper | None, str]:
    """The citation at the start of a docstring, and what follows it."""
    match = _PAPER.match(text)
    if match is None:
        return None, text
    words = {key: " ".join(match[key].split()) for key in ("authors", "title", "venue", "url")}
    words["venue"] = re.sub(r" \(.*\)", "", words["venue"])
    if words["venue"].isdigit() and "arxiv.org" in words["url"]:
        words["venue"] = f"arXiv {words['venue']}"
    return Paper(**words), match["rest"].strip()


def _split_traps(text: str) -> tuple[str, list[str]]:
    """A section "Traps:" apart, one trap for each item or paragraph of it."""
    before, heading, section = text.partition("Traps:\n")
    if not heading:
        return text, []
    section = textwrap.dedent(section).strip()
    items = re.split(r"^- |\n- ", section) if section.startswith("- ") else re.split(r"\n\s*\n", section)
    return before.strip(), [" ".join(item.split()) for item in items if item.strip()]


def _loss_terms(kind: type[Method]) -> dict[str, str]:
    """Formulas of the functions that a method's class uses, and of those that these use."""
    found: dict[str, str] = {}
    seen: set[Any] = set()
    for each in kind.__mro__:
        if issubclass(each, Method) and not each.__module__.endswith((".base", ".wrappers")):
            _collect_formulas(each, found, seen)
    return found


def _collect_formulas(owner: Any, found: dict[str, str], seen: set[Any]) -> None:
    """Look at the global names that a function, or a class's functions, read."""
    seen.add(owner)
    members = list(vars(owner).values()) if inspect.isclass(owner) else [owner]
    members = [inspect.unwrap(getattr(each, "fget", None) or getattr(each, "__func__", each)) for each in members]
    for function in filter(inspect.isfunction, members):
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            value = inspect.unwrap(value)
            where = value.__module__
            # Of other files functions only: a class from there is another method, or a layer that several share.
            local = inspect.isclass(value) and where == owner.__module__
            near = where.startswith(_FOLDER) or where == owner.__module__
            if value in seen or not (local or (inspect.isfunction(value) and near)):
                continue
            formulas = _MATH.findall(inspect.cleandoc(value.__doc__ or ""))
            if formulas:
                found[value.__name__] = "; ".join(tex_to_text(" ".join(each.split())) for each in formulas)
            _collect_formulas(value, found, seen)


def _names(code: types.CodeType) -> list[str]:
    """The names that compiled code reads, those in comprehensions and lambdas included, in the order of the source.

    Not in that of the byte code: Python 3.12 compiles comprehensions into the function around them.
    """
    return [name for *_, name in sorted(_located_names(code))]


def _located_names(code: types.CodeType) -> Iterator[tuple[int, int, str]]:
    for each in dis.get_instructions(code):
        if each.opcode in dis.hasname and each.positions is not None:
            yield each.positions.lineno or 0, each.positions.col_offset or 0, each.argval
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _located_names(each)


def _traps_from_requirements(needs: Requirements) -> list[str]:
    """What follows from the needs alone, the same for every method that has them."""
    known = {
        "index": "Remembers training images by their ids, so mixup and cutmix are refused.",
        "training_only": "Val curves show the label term alone: the others mean nothing on images that are not those "
        "of training.",
        "batch_size": "Its layers are sized by the batch size: in a smaller last batch they read zeros for the missing "
        "images.",
        "several": "Its terms look at the images of a batch together: they depend on the batch size, and one image "
        "alone is refused.",
        "labels": "Reads the label of every image: unlabeled images are refused.",
        "pooled": "A network whose head reads something else than the mean of its last feature map is refused.",
        "norms": "A teacher without BatchNorm in front of its maps is refused.",
        "epoch": "Changes with the epochs: a loop of your own calls `distiller.start_epoch(epoch, epochs)`.",
        "prepare": "Learns from the teacher before training: a loop of your own calls `distiller.prepare(batches)`.",
    }
    found = [text for key, text in known.items() if getattr(needs, key)]
    if needs.second != "none":
        found.append("Every image comes twice: student and teacher run on both, and mixup and cutmix are refused.")
    return found


_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}^_&]|\s+|[^\\{}^_&\s]", re.DOTALL)
_GAP = "\u2003"  # between formulas of one line
_SILENT = {r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\left", r"\right", r"\!", r"\displaystyle"}
_UNWRAPPED_COMMANDS = {r"\mathrm", r"\text", r"\mathbf", r"\mathcal", r"\operatorname", r"\mathbb"}
_FUNCTION_COMMANDS = {r"\bar": "mean", r"\overline": "mean", r"\sqrt": "√"}
_ACCENTS = {r"\hat": "\u0302", r"\tilde": "\u0303"}
_SYMBOLS = {
    r"\sum": "Σ", r"\prod": "Π", r"\alpha": "α", r"\beta": "β", r"\gamma": "γ", r"\delta": "δ", r"\epsilon": "ε",
    r"\lambda": "λ", r"\mu": "μ", r"\phi": "φ", r"\Phi": "Φ", r"\pi": "π", r"\rho": "ρ", r"\sigma": "σ", r"\tau": "τ",
    r"\theta": "θ", r"\eta": "η", r"\omega": "ω", r"\Delta": "Δ", r"\Sigma": "Σ", r"\Lambda": "Λ", r"\ell": "ℓ",
    r"\cdot": "·", r"\times": "×", r"\circ": "∘", r"\odot": "⊙", r"\le": "≤", r"\ge": "≥", r"\ne": "≠", r"\neq": "≠",
    r"\in": "∈", r"\to": "→", r"\sim": "~", r"\approx": "≈", r"\infty": "∞", r"\angle": "∠", r"\setminus": "∖",
    r"\top": "ᵀ", r"\ldots": "…", r"\dots": "…", r"\mid": "|", r"\pm": "±", r"\langle": "⟨", r"\rangle": "⟩",
    r"\lVert": "⟦", r"\rVert": "⟧", r"\lvert": "⟨|", r"\rvert": "|⟩", r"\|": "‖", r"\{": "{", r"\}": "}",
    r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", r"\quad": _GAP, r"\qquad": _GAP, "\\\\": "; ", "&": " if ",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_OPEN, _CLOSE = "([{⟨⟦", ")]}⟩⟧"


def tex_to_text(tex: str) -> str:
    r"""One formula as one line of text.

    Fractions become quotients, bars means, norms double strokes; indices of several signs stand in parentheses.

    Example:
        >>> tex_to_text(r"T^2 \, \mathrm{KL}(p_t \,\|\, p_s)")
        'T² KL(p_t ‖ p_s)'
        >>> tex_to_text(r"\frac{1}{B C} \sum_{b,c} \lVert a - \bar a \rVert_2^2")
        '1/(B C) Σ_(b,c) ‖a - mean(a)‖_2²'
    """
    text = "".join(_TexParser(_TOKEN.findall(tex.strip())).until(None))
    text = re.sub(r"⟦ *", "‖", re.sub(r" *⟧", "‖", text))
    text = re.sub(r"⟨\| *", "|", re.sub(r" *\|⟩", "|", text))
    text = re.sub(r"([([⟨]) +", r"\1", re.sub(r" +([)\],;⟩])", r"\1", text))
    text = re.sub(rf" *{_GAP}[ {_GAP}]*", _GAP, re.sub(r" +", " ", text))
    text = text.replace(" if else", " else").replace("∖ ", "∖").replace(_GAP, "  ").strip()
    return unicodedata.normalize("NFC", text)


class _TexParser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def until(self, end: str | None) -> Iterator[str]:
        while self.position < len(self.tokens):
            if self.tokens[self.position] == end:
                self.position += 1
                return
            yield self.element()

    def element(self) -> str:
        token = self.tokens[self.position]
        self.position += 1
        if token == "{":  # nosec B105 # of TeX
            return "".join(self.until("}"))
        if token in "^_":  # nosec B105 # of TeX
            return self.script(token)
        if token in _SILENT:
            return ""
        if token in (r"\begin", r"\end"):
            self.argument()
            return "{ " if token == r"\begin" else " }"  # nosec B105 # of TeX
        if token == r"\frac":  # nosec B105 # of TeX
            above, below = self.argument(), self.argument()
            return f"{_parenthesize(above)}/{_parenthesize(below)}"
        if token in _UNWRAPPED_COMMANDS:
            return self.argument()
        if token in _FUNCTION_COMMANDS:
            return f"{_FUNCTION_COMMANDS[token]}({self.argument()})"
        if token in _ACCENTS:
            argument = self.argument()
            return argument[:1] + _ACCENTS[token] + argument[1:]
        if token.isspace():
            return " "
        return _SYMBOLS.get(token, token.removeprefix("\\"))

    def argument(self) -> str:
        while self.position < len(self.tokens) and self.tokens[self.position].isspace():
            self.position += 1
        return self.element().strip() if self.position < len(self.tokens) else ""

    def script(self, token: str) -> str:
        argument = self.argument().replace("∖ ", "∖")
        if token == "^" and re.fullmatch(r"-?\d", argument):  # nosec B105 # of TeX
            return argument.translate(_SUPERSCRIPT)
        if argument == "ᵀ":
            return argument
        alone = re.fullmatch(r"\w+|∖\w", argument)
        return f"{token}{argument}" if alone else f"{token}({argument})"


def _parenthesize(text: str) -> str:
    """In parentheses where an operator or a product is not inside some already."""
    depth = 0
    for sign in text:
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if depth == 0 and sign in " +-−/·=":
            return f"({text})"
    return text


if __name__ == "__main__":
    write_catalog()
