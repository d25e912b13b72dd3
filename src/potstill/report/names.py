"""Names from folders and files, made fit to be shown: whatever they hold comes out as visible text."""

import unicodedata

# Joiners shape letters and emoji; every other invisible character is shown by its number.
_JOINERS = {"\u200c", "\u200d"}
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def plain(name: str) -> str:
    r"""``name`` with control, direction-changing and unpaired characters written as escapes.

    Example:
        >>> plain("cat\x1b[31m\u202egpj")
        'cat\\x1b[31m\\u202egpj'
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(_visible(character) for character in name)


def short(name: str, longest: int = 18) -> str:
    """``plain(name)`` with the middle left out where it has more than ``longest`` characters.

    Example:
        >>> short("golden_retriever_puppy", 12)
        'golden…puppy'
    """
    name = plain(name)
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[len(name) - tail :]}"


def columns(text: str) -> int:
    """Columns that ``text`` takes in a terminal: 2 for wide characters, 0 for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _visible(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _INVISIBLE:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
