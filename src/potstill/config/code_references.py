"""Which settings of a recipe may name code from outside the package, and when such a recipe is refused.

A name on the command line or from Python is the caller's own. A name in a recipe file may be anybody's, and loading it
runs code: such a recipe needs ``--allow-code``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.code_references import is_code_reference, resolve_reference
from potstill.config.yaml import KeyLocations, KeyPath
from potstill.errors import UsageError

CODE_KEYS = {"method": "name", "teacher": "model", "assistants": "model", "student": "model"}  # by section


def find_code(value: Any) -> Iterator[tuple[KeyPath, str]]:
    """Every code reference in a recipe's plain values, with its key.

    Example:
        >>> list(find_code({"method": {"name": "ls", "base_method": {"name": "mine.py:Mine"}}, "name": "a:b"}))
        [(('method', 'base_method', 'name'), 'mine.py:Mine')]
    """
    for section, key in CODE_KEYS.items():
        if isinstance(value, dict):
            yield from _find_code(value.get(section), (section,), key)


def _find_code(value: Any, path: KeyPath, key: str) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == key and isinstance(item, str) and is_code_reference(item):
                yield (*path, name), item
            yield from _find_code(item, (*path, name), key)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _find_code(item, (*path, position), key)


def refuse_code_in_recipe(value: Any, places: KeyLocations | None = None) -> None:
    """Refuse a recipe that names code, unless the command line gave the name; nothing is loaded.

    Args:
        value: the recipe's plain values, after flags and ``--set``.
        places: where each key was written; None: everything comes from somebody else.

    Raises:
        UsageError: names every key and what it names.
    """
    found = [
        (places.find(path) if places else "", name)
        for path, name in find_code(value)
        if places is None or not is_own(path, places)
    ]
    if found:
        lines = [f"{place}: {name}" if place else name for place, name in found]
        raise UsageError(
            "this recipe names code that would run on this machine:\n"
            + "\n".join(lines)
            + "\nRead that code; if you trust it, add --allow-code (from Python: allow_code=True)"
        )


def resolve_code_paths(value: Any, places: KeyLocations, folder: Path) -> None:
    """Make the paths of code files absolute, in place: in a recipe file they start from its folder, in flags from the
    working folder.
    """
    for path, name in list(find_code(value)):
        section = value
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = resolve_reference(name, None if is_own(path, places) else folder)


def is_own(path: KeyPath, places: KeyLocations) -> bool:
    """Whether a value comes from a flag or from a dict in Python, and so from whoever runs this."""
    place = places.find(path)
    return not place or place.startswith("--")
