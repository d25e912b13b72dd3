"""Class names in picture files: in fonts of this machine that have their letters, else as numbers.

A page is drawn by a browser, which finds fonts by itself; a PNG file holds what matplotlib could draw.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from potstill.report.names import plain

DEFAULT = "DejaVu Sans"  # comes with matplotlib


class Labels(NamedTuple):
    """Class names as a picture can show them."""

    names: tuple[str, ...]  # "#3" (counted from 1) where no font has the letters
    families: tuple[str, ...]  # fonts that are needed beside the default one
    unreadable: tuple[str, ...]  # the names that were replaced

    @property
    def legend(self) -> str:
        """The text to stand beside the numbers; empty where there are none."""
        return "(#n: n-th class of model.json)" if self.unreadable else ""

    @property
    def warning(self) -> str:
        """One sentence for the user; empty where every name can be shown."""
        if not self.unreadable:
            return ""
        some = ", ".join(map(plain, self.unreadable[:3])) + (", ..." if len(self.unreadable) > 3 else "")
        return (
            f"no installed font has the letters of {len(self.unreadable)} class names ({some}): picture files show "
            "their numbers (#1 is the first class of model.json). Install a font for them, such as Noto Sans, and run "
            "potstill report"
        )


def labels(class_names: Sequence[str]) -> Labels:
    """Return what pictures show in place of ``class_names``.

    Example:
        >>> labels(["cat", "dog"])
        Labels(names=('cat', 'dog'), families=(), unreadable=())
    """
    return _labels(tuple(class_names))


@cache
def _labels(class_names: tuple[str, ...]) -> Labels:
    shown = [plain(name) for name in class_names]
    if all(name.isascii() for name in shown):
        return Labels(class_names, (), ())
    wanted = {character for name in shown for character in name if not character.isspace()} - _letters_of_default()
    families: list[str] = []
    for family, letters in _installed() if wanted else ():
        if found := wanted & letters:
            families.append(family)
            wanted = wanted - found
        if not wanted:
            break
    missing = [bool(wanted & set(name)) for name in shown]
    return Labels(
        tuple(f"#{i}" if gone else name for i, (name, gone) in enumerate(zip(class_names, missing, strict=True), 1)),
        tuple(families),
        tuple(name for name, gone in zip(class_names, missing, strict=True) if gone),
    )


@cache
def _letters_of_default() -> frozenset[str]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(findfont(DEFAULT)).get_charmap()))


@cache
def _installed() -> tuple[tuple[str, frozenset[str]], ...]:
    """Family and letters of every outline font of this machine, upright and of regular weight first.

    Fonts are looked for anew, since matplotlib's own list is kept from its first start on.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager
    from matplotlib.ft2font import FT2Font

    found: list[tuple[bool, str, str, frozenset[str]]] = []
    for path in sorted(findSystemFonts()):
        try:
            font = FT2Font(path)
            if font.scalable:  # fonts of coloured bitmaps (emoji) cannot be drawn
                letters = frozenset(map(chr, font.get_charmap()))
                found.append((font.style_name not in ("Regular", "Book"), font.family_name, path, letters))
        except (OSError, RuntimeError, ValueError):  # a file that is no font, or of a kind that FreeType cannot read
            continue
    best: dict[str, tuple[str, frozenset[str]]] = {}
    for _, family, path, letters in sorted(found, key=lambda each: each[:3]):
        best.setdefault(family, (path, letters))
    known = {entry.fname for entry in fontManager.ttflist}
    for path, _ in best.values():
        if path not in known:
            fontManager.addfont(path)
    return tuple((family, letters) for family, (_, letters) in best.items())
