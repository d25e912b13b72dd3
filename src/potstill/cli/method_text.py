"""A method as text: what ``potstill methods NAME`` prints."""

import shutil
import textwrap
from collections.abc import Iterable

from potstill.book.about import About, Price, about, by_kind, measured
from potstill.methods.catalog import REQUIRED, Option


def list_text() -> list[tuple[str, str, str]]:
    """(name, kind, one sentence) of every method, kind by kind."""
    return [(name, kind, about(name).entry.summary.rstrip()) for kind, names in by_kind().items() for name in names]


def method_text(name: str) -> str:
    """Everything that is known of a method.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    found = about(name)
    sections = [
        _wrapped(found.entry.summary),
        _paper(found),
        _section("Loss", [_wrapped(_plain(found.loss), 2), *_rows(found.terms, wrap=False)]),
        _section(f"Needs ({found.kind})", [_wrapped(", ".join(found.needs), 2)]),
        _section("Options (method.NAME in a recipe)", _rows({k: option_text(*v) for k, v in found.options.items()})),
        _section("Presets (method.preset)", _rows({k: settings_text(v) for k, v in found.entry.presets.items()})),
        _section("Published top-1 of the student", _rows({k: f"{v:.2f} %" for k, v in found.entry.published.items()})),
        _section("Price", [_wrapped(price_text(found.price), 2)] if found.price else []),
        _section("Notes", [_wrapped(_plain(found.notes), 2)] if found.notes else []),
        _section("Traps", [f"  - {_wrapped(_plain(trap), 4).lstrip()}" for trap in found.traps]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def option_text(option: Option, meaning: str) -> str:
    """Range, default and meaning of an option."""
    default = "required" if option.default is REQUIRED else f"default {option.default}"
    return f"{option.allowed}, {default}" + (f": {_plain(meaning)}" if meaning else "")


def settings_text(settings: dict[str, object]) -> str:
    """Options of a preset, as after ``--set``."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def price_text(price: Price) -> str:
    """What a step costs, in one sentence."""
    facts = measured()
    teacher = f", {price.teacher:.2f} of it the teacher's" if price.teacher else ""
    adapters = f"; {price.adapters:,} trained numbers beside the student's" if price.adapters else ""
    return (
        f"a step takes {price.time:.2f} times that of the student on labels alone (quartiles {price.low:.2f} to "
        f"{price.high:.2f}{teacher}) and {price.memory:.2f} times its memory{adapters}. "
        f"{facts['teacher']} -> {facts['student']}, batches of {facts['batch']}, {facts['machine']['processor']}."
    )


def _paper(found: About) -> str:
    if found.paper is None:
        return ""
    paper = found.paper
    return _wrapped(f'{paper.authors}, "{paper.title}", {paper.venue}.') + f"\n{paper.url}"


def _section(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _rows(rows: dict[str, str], *, wrap: bool = True) -> list[str]:
    """Two columns; long texts go on below their own beginning."""
    width = max(map(len, rows), default=0)
    room = max(_width() - width - 4, 30)
    return [
        f"  {key:<{width}}  "
        + (f"\n{' ' * (width + 4)}".join(textwrap.wrap(text, room, break_on_hyphens=False)) if wrap else text)
        for key, text in rows.items()
    ]


def _wrapped(text: str, indent: int = 0) -> str:
    """Paragraphs filled to the terminal's width."""
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
