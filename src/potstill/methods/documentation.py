"""Documentation of a method for the terminal and its page, gathered from its source; imports no torch.

Formulas of docstrings, which are TeX, become plain text.  Requirements are read from the class's source: tables, help
and pages need them before anybody imports torch.  price.json beside this file is written by benchmarks/method_price.py.
"""

import ast
import importlib.util
import json
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from potstill.methods import METHODS, REQUIRED, MethodInfo, MethodOption, create_method, list_methods, method_info
from potstill.methods.requirements import Requirements

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
    """Reads a row of tokens from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def until(self, end: str | None) -> Iterator[str]:
        """The text of each element, up to a token or to the end of all."""
        while self.position < len(self.tokens):
            if self.tokens[self.position] == end:
                self.position += 1
                return
            yield self.element()

    def element(self) -> str:
        """The next token with its arguments, as text."""
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
        """The next group, or the next token where there are no braces."""
        while self.position < len(self.tokens) and self.tokens[self.position].isspace():
            self.position += 1
        return self.element().strip() if self.position < len(self.tokens) else ""

    def script(self, token: str) -> str:
        """An exponent or an index."""
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


ClassInModule = tuple[str, ast.ClassDef]  # a module's name, and a class in it


@cache
def declared_requirements(name: str) -> Requirements | None:
    """The needs of a method with the default of each option; None where it has those of the methods inside it.

    Raises:
        UsageError: unknown name.
    """
    options = method_info(name).options
    if is_wrapper(name):
        return None
    module, _, class_name = METHODS[name].partition(":")
    values = {key: option.default for key, option in options.items() if option.default is not REQUIRED}
    for where, definition in class_lineage(module, class_name):
        for expression in _requirement_expressions(definition):
            try:
                found = eval(
                    ast.unparse(expression), {"Requirements": Requirements, **_module_constants(where)}, values
                )  # nosec B307 # of our own source
            except NameError:  # it depends on more than options: the class itself must say
                found = create_method(name).needs
            assert isinstance(found, Requirements)
            return found
    return Requirements()


def declared_student_layers(name: str) -> tuple[str, ...]:
    """Submodules that a method's student must have, by path."""
    module, _, class_name = METHODS[name].partition(":")
    for where, definition in class_lineage(module, class_name):
        for node in definition.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "student_taps":
                return tuple(eval(ast.unparse(node.value), _module_constants(where)))  # nosec B307 # likewise
    return ()


def is_wrapper(name: str) -> bool:
    """Whether a method works on other methods, which it takes as options."""
    return any("MethodSettings" in option.annotation for option in method_info(name).options.values())


def class_lineage(module: str, class_name: str) -> Iterator[ClassInModule]:
    """The class and those of this package that it is made from, nearest first."""
    definition = next(
        (each for each in parse_module(module).body if isinstance(each, ast.ClassDef) and each.name == class_name), None
    )
    if definition is None:
        return
    yield module, definition
    for base in definition.bases:
        if isinstance(base, ast.Name) and (where := defining_module(module, base.id)):
            yield from class_lineage(where, base.id)


def defining_module(module: str, name: str) -> str:
    """The module that a name in ``module`` comes from; "" where it is no module of this package."""
    for node in parse_module(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return node.module if node.module.startswith("potstill.") else ""
    return module


def _requirement_expressions(definition: ast.ClassDef) -> Iterator[ast.expr]:
    """What a class assigns to its needs, in ``__init__`` or for itself."""
    for node in ast.walk(definition):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if value is not None and any(ast.unparse(target) in ("needs", "self.needs") for target in targets):
            yield value


def _module_constants(module: str) -> dict[str, Any]:
    """The module's names for plain values."""
    found = {}
    for node in parse_module(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


@cache
def parse_module(module: str) -> ast.Module:
    """A module's source, parsed."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


METHOD_KINDS = (
    "logits", "feature maps", "embeddings", "several teachers", "peers", "no teacher", "around other methods",
)  # fmt: skip
COSTS_FILE = Path(__file__).parent / "price.json"  # written by benchmarks/method_price.py

_PAPER = re.compile(
    r'(?P<authors>[^":(]+), "(?P<title>[^"]+)",\s+(?P<venue>[^.]*[^.\s])\.?\s+(?P<url>https?://\S+)\s*(?P<rest>.*)',
    re.DOTALL,
)
_MATH = re.compile(r"\.\. math::(.*?)(?=\n\s*\n|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"^(\w+): (.*)$")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    venue: str  # with the year
    url: str


@dataclass(frozen=True)
class StepCost:
    """What a training step costs beside one on labels alone; see ``benchmarks/method_price.py``."""

    time: float  # the step's time over that of the student on labels alone
    low: float  # the lower and the upper quartile of that ratio
    high: float
    teacher: float  # what of it goes into the teacher's forward pass
    memory: float  # the step's peak of memory over the other's
    adapters: int  # trained numbers beside the student's


@dataclass(frozen=True)
class MethodDocumentation:
    """A method, for people."""

    entry: MethodInfo
    kind: str  # one of KINDS
    paper: Paper | None
    notes: str  # what stands behind the paper in the module's docstring: forms, differences to released code
    loss: str  # the whole loss in words, from the class's docstring
    terms: dict[str, str]  # by name of a function: its formula
    options: dict[str, tuple[MethodOption, str]]  # with what it is
    needs: list[str]  # in words
    traps: list[str]
    price: StepCost | None  # None: not measured


@cache
def method_documentation(name: str) -> MethodDocumentation:
    """Everything about a method, without importing torch.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    found = method_info(name)
    paper, notes = _parse_citation(found.paper)
    notes, traps = _split_traps(notes)
    says, arguments, behind = _parse_docstring(found.doc)
    says, more = _split_traps(says)
    needs, layers = declared_requirements(name), declared_student_layers(name)
    listed = ["what the methods inside it need"] if needs is None else needs.listed()
    return MethodDocumentation(
        entry=found,
        kind=_method_kind(name, needs),
        paper=paper,
        notes=notes,
        loss=says,
        terms=_loss_terms(name),
        options={key: (option, arguments.get(key, "")) for key, option in found.options.items()},
        needs=[*listed, f"student's layers {' and '.join(layers)}"] if layers else listed,
        traps=[*traps, *more, *([behind] if behind else []), *(_traps_from_requirements(needs) if needs else [])],
        price=step_costs().get(name),
    )


def methods_by_kind() -> dict[str, list[str]]:
    """Names of all methods, by kind."""
    return {kind: [name for name in list_methods() if method_documentation(name).kind == kind] for kind in METHOD_KINDS}


@cache
def measured_costs() -> dict[str, Any]:
    """The file of prices as it is: machine, pair of networks, plain step, methods; {} where nobody has measured."""
    return json.loads(COSTS_FILE.read_text(encoding="utf-8")) if COSTS_FILE.is_file() else {}


def step_costs() -> dict[str, StepCost]:
    """Measured prices by name of the method."""
    return {name: StepCost(**values) for name, values in measured_costs().get("methods", {}).items()}


def _method_kind(name: str, needs: Requirements | None) -> str:
    if needs is None or is_wrapper(name):
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


def _parse_docstring(doc: str) -> tuple[str, dict[str, str], str]:
    """A class's docstring: what stands before its arguments, each argument's sentence, what stands behind them."""
    says, heading, rest = doc.partition("\n\nArgs:\n")
    lines = rest.splitlines() if heading else []
    inside = [line for line in lines if line.startswith(" ") or not line]
    arguments: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", textwrap.dedent("\n".join(inside)).strip()):
        if match := _ARGUMENT.match(" ".join(block.split())):
            arguments[match[1]] = match[2]
    behind = " ".join(line for line in lines if line and not line.startswith(" "))
    return says, arguments, "" if behind.startswith(("Raises:", "Example:")) else behind


def _loss_terms(name: str) -> dict[str, str]:
    """Formulas of the functions that a method's class uses, and of those that these use."""
    module, _, class_name = METHODS[name].partition(":")
    found: dict[str, str] = {}
    for where, definition in class_lineage(module, class_name):
        if not where.endswith((".base", ".wrappers")):
            _collect_formulas(where, definition, found, {class_name})
    return found


def _collect_formulas(module: str, node: ast.AST, found: dict[str, str], seen: set[str]) -> None:
    for each in ast.walk(node):
        if not isinstance(each, ast.Name) or each.id in seen:
            continue
        seen.add(each.id)
        where = defining_module(module, each.id)
        if not where.startswith("potstill.methods."):
            continue
        # Of other files functions only: a class from there is another method, or a layer that several share.
        kinds = (ast.FunctionDef, ast.ClassDef) if where == module else (ast.FunctionDef,)
        for definition in parse_module(where).body:
            if isinstance(definition, kinds) and definition.name == each.id:
                formulas = _MATH.findall(ast.get_docstring(definition) or "")
                if formulas:
                    found[each.id] = "; ".join(tex_to_text(" ".join(formula.split())) for formula in formulas)
                _collect_formulas(where, definition, found, seen)


def _traps_from_requirements(needs: Requirements) -> list[str]:
    """What follows from the needs alone, the same for every method that has them."""
    known = {
        "index": "Remembers training images by their ids, so mixup and cutmix are refused.",
        "training_only": "Val curves show the label term alone: the others mean nothing on images that are not those "
        "of training.",
        "batch_size": "Its layers are sized by the batch size: the last, smaller batch of an epoch is left out.",
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
