"""All that is told about a method, in the terminal and on its page, gathered from its source and never by hand."""

import ast
import json
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from potstill.book.declared import declared_layers, declared_needs, home, is_around, lineage, syntax
from potstill.book.formulas import plain
from potstill.methods import METHODS, list_methods
from potstill.methods.catalog import Entry, Option, entry
from potstill.methods.needs import Needs

KINDS = (
    "logits", "feature maps", "embeddings", "several teachers", "peers", "no teacher", "around other methods",
)  # fmt: skip
PRICES = Path(__file__).parent / "price.json"  # written by benchmarks/method_price.py

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
class Price:
    """What a training step costs beside one on labels alone; see ``benchmarks/method_price.py``."""

    time: float  # the step's time over that of the student on labels alone
    low: float  # the lower and the upper quartile of that ratio
    high: float
    teacher: float  # what of it goes into the teacher's forward pass
    memory: float  # the step's peak of memory over the other's
    adapters: int  # trained numbers beside the student's


@dataclass(frozen=True)
class About:
    """A method, for people."""

    entry: Entry
    kind: str  # one of KINDS
    paper: Paper | None
    notes: str  # what stands behind the paper in the module's docstring: forms, differences to released code
    loss: str  # the whole loss in words, from the class's docstring
    terms: dict[str, str]  # by name of a function: its formula
    options: dict[str, tuple[Option, str]]  # with what it is
    needs: list[str]  # in words
    traps: list[str]
    price: Price | None  # None: not measured


@cache
def about(name: str) -> About:
    """Everything about a method, without importing torch.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    found = entry(name)
    paper, notes = _paper(found.paper)
    notes, traps = _split_traps(notes)
    says, arguments, behind = _sections(found.doc)
    says, more = _split_traps(says)
    needs, layers = declared_needs(name), declared_layers(name)
    listed = ["what the methods inside it need"] if needs is None else needs.listed()
    return About(
        entry=found,
        kind=_kind(name, needs),
        paper=paper,
        notes=notes,
        loss=says,
        terms=_terms(name),
        options={key: (option, arguments.get(key, "")) for key, option in found.options.items()},
        needs=[*listed, f"student's layers {' and '.join(layers)}"] if layers else listed,
        traps=[*traps, *more, *([behind] if behind else []), *(_traps_of(needs) if needs else [])],
        price=prices().get(name),
    )


def by_kind() -> dict[str, list[str]]:
    """Names of all methods, by kind."""
    return {kind: [name for name in list_methods() if about(name).kind == kind] for kind in KINDS}


@cache
def measured() -> dict[str, Any]:
    """The file of prices as it is: machine, pair of networks, plain step, methods; {} where nobody has measured."""
    return json.loads(PRICES.read_text(encoding="utf-8")) if PRICES.is_file() else {}


def prices() -> dict[str, Price]:
    """Measured prices by name of the method."""
    return {name: Price(**values) for name, values in measured().get("methods", {}).items()}


def _kind(name: str, needs: Needs | None) -> str:
    if needs is None or is_around(name):
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


def _paper(text: str) -> tuple[Paper | None, str]:
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


def _sections(doc: str) -> tuple[str, dict[str, str], str]:
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


def _terms(name: str) -> dict[str, str]:
    """Formulas of the functions that a method's class uses, and of those that these use."""
    module, _, class_name = METHODS[name].partition(":")
    found: dict[str, str] = {}
    for where, definition in lineage(module, class_name):
        if not where.endswith((".base", ".around")):
            _collect(where, definition, found, {class_name})
    return found


def _collect(module: str, node: ast.AST, found: dict[str, str], seen: set[str]) -> None:
    for each in ast.walk(node):
        if not isinstance(each, ast.Name) or each.id in seen:
            continue
        seen.add(each.id)
        where = home(module, each.id)
        if not where.startswith("potstill.methods."):
            continue
        # Of other files functions only: a class from there is another method, or a layer that several share.
        kinds = (ast.FunctionDef, ast.ClassDef) if where == module else (ast.FunctionDef,)
        for definition in syntax(where).body:
            if isinstance(definition, kinds) and definition.name == each.id:
                formulas = _MATH.findall(ast.get_docstring(definition) or "")
                if formulas:
                    found[each.id] = "; ".join(plain(" ".join(formula.split())) for formula in formulas)
                _collect(where, definition, found, seen)


def _traps_of(needs: Needs) -> list[str]:
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
