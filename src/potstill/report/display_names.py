"""Names from folders and files as visible text.

Browsers find fonts by themselves; PNG files show class names in installed fonts that have their letters, or as numbers.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

# Joiners shape letters and emoji; every other invisible character is escaped.
_ZERO_WIDTH_JOINERS = {"\u200c", "\u200d"}
_INVISIBLE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def escape_invisible(name: str) -> str:
    r"""Escape control characters, bidirectional overrides and lone surrogates.

    Example:
        >>> escape_invisible("cat\x1b[31m\u202egpj")
        'cat\\x1b[31m\\u202egpj'
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(_escape_character(character) for character in name)


def shorten(name: str, longest: int = 18) -> str:
    """Escape invisible characters and, above ``longest`` characters, leave out the middle.

    Example:
        >>> shorten("golden_retriever_puppy", 12)
        'golden…puppy'
    """
    name = escape_invisible(name)
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[len(name) - tail :]}"


def _escape_character(character: str) -> str:
    if character in _ZERO_WIDTH_JOINERS or unicodedata.category(character) not in _INVISIBLE_CATEGORIES:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib


class PictureLabels(NamedTuple):
    """Class names as figures show them."""

    names: tuple[str, ...]  # "#3" (counted from 1) if no font has the letters
    families: tuple[str, ...]  # fonts needed besides the default one
    unreadable: tuple[str, ...]  # the names that were replaced

    @property
    def legend(self) -> str:
        """Explanation of the numbers; empty if there are none."""
        return "(#n: n-th class of model.json)" if self.unreadable else ""

    @property
    def warning(self) -> str:
        """Warning for the user; empty if every name can be shown."""
        if not self.unreadable:
            return ""
        some = ", ".join(map(escape_invisible, self.unreadable[:3])) + (", ..." if len(self.unreadable) > 3 else "")
        return (
            f"no installed font has the letters of {len(self.unreadable)} class "
            f"name{'' if len(self.unreadable) == 1 else 's'} ({some}): picture files show "
            "their numbers (#1 is the first class of model.json). Install a font for them, such as Noto Sans, and run "
            "potstill report"
        )


def picture_labels(class_names: Sequence[str]) -> PictureLabels:
    """Return ``class_names`` as figures show them.

    Example:
        >>> picture_labels(["cat", "dog"])
        PictureLabels(names=('cat', 'dog'), families=(), unreadable=())
    """
    return _picture_labels(tuple(class_names))


@cache
def _picture_labels(class_names: tuple[str, ...]) -> PictureLabels:
    shown = [escape_invisible(name) for name in class_names]
    if all(name.isascii() for name in shown):
        return PictureLabels(class_names, (), ())
    missing = {character for name in shown for character in name if not character.isspace()} - _default_font_letters()
    families: list[str] = []
    for family, letters in _installed_fonts() if missing else ():
        if found := missing & letters:
            families.append(family)
            missing = missing - found
        if not missing:
            break
    unreadable = [bool(missing & set(name)) for name in shown]
    return PictureLabels(
        tuple(f"#{i}" if bad else name for i, (name, bad) in enumerate(zip(class_names, unreadable, strict=True), 1)),
        tuple(families),
        tuple(name for name, bad in zip(class_names, unreadable, strict=True) if bad),
    )


@cache
def _default_font_letters() -> frozenset[str]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(findfont(DEFAULT_FONT)).get_charmap()))


@cache
def _installed_fonts() -> tuple[tuple[str, frozenset[str]], ...]:
    """Return family and letters of every installed outline font, regular ones first; matplotlib's list is cached."""
    from matplotlib.font_manager import findSystemFonts, fontManager
    from matplotlib.ft2font import FT2Font

    found: list[tuple[bool, str, str, frozenset[str]]] = []
    for path in sorted(findSystemFonts()):
        try:
            font = FT2Font(path)
            if font.scalable:  # fonts of coloured bitmaps (emoji) cannot be drawn
                letters = frozenset(map(chr, font.get_charmap()))
                found.append((font.style_name not in ("Regular", "Book"), font.family_name, path, letters))
        except (OSError, RuntimeError, ValueError):  # no font, or none that FreeType can read
            continue
    best: dict[str, tuple[str, frozenset[str]]] = {}
    for _, family, path, letters in sorted(found, key=lambda each: each[:3]):
        best.setdefault(family, (path, letters))
    known = {entry.fname for entry in fontManager.ttflist}
    for path, _ in best.values():
        if path not in known:
            fontManager.addfont(path)
    return tuple((family, letters) for family, (_, letters) in best.items())
