"""Settings that may name code outside the package, and the permission that they need.

Code named on the command line or in Python is trusted. Code named in a recipe file, which may come from a stranger,
needs ``--allow-code``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.code_references import is_code_reference, resolve_reference
from potstill.config.yaml import KeyLocations, KeyPath
from potstill.errors import UsageError

CODE_KEYS = {  # by section
    "method": ("name",),
    "teacher": ("model",),
    "assistants": ("model",),
    "student": ("model",),
    "data": ("source", "target"),
}


def find_code(value: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield the code references in a recipe's plain values, as (key path, reference).

    Example:
        >>> list(find_code({"method": {"name": "ls", "base_method": {"name": "mine.py:Mine"}}, "name": "a:b"}))
        [(('method', 'base_method', 'name'), 'mine.py:Mine')]
    """
    for section, keys in CODE_KEYS.items():
        if isinstance(value, dict):
            yield from _find_code(value.get(section), (section,), keys)


def _find_code(value: Any, path: KeyPath, keys: tuple[str, ...]) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name in keys and isinstance(item, str) and is_code_reference(item):
                yield (*path, name), item
            yield from _find_code(item, (*path, name), keys)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _find_code(item, (*path, position), keys)


def refuse_code_in_recipe(value: Any, locations: KeyLocations | None = None) -> None:
    """Raise an error if a recipe file names code; load nothing.

    Args:
        value: the recipe's plain values, after flags and ``--set``.
        locations: where each key was written; None: all of ``value`` comes from a recipe file.

    Raises:
        UsageError: names every such key and its code.
    """
    found = [
        (locations.find(path) if locations else "", name)
        for path, name in find_code(value)
        if locations is None or not is_from_caller(path, locations)
    ]
    if found:
        lines = [f"{location}: {name}" if location else name for location, name in found]
        raise UsageError(
            "this recipe names code that would run on this machine:\n"
            + "\n".join(lines)
            + "\nRead that code; if you trust it, add --allow-code (from Python: allow_code=True)"
        )


def resolve_code_paths(value: Any, locations: KeyLocations, folder: Path) -> None:
    """Make the paths of code files absolute, in place: relative to ``folder``, that of the recipe file; if they come
    from flags, to the working folder.
    """
    for path, name in list(find_code(value)):
        section = value
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = resolve_reference(name, None if is_from_caller(path, locations) else folder)


def is_from_caller(path: KeyPath, locations: KeyLocations) -> bool:
    """Return whether a value comes from a flag or from Python, not from a recipe file."""
    location = locations.find(path)
    return not location or location.startswith("--")
