"""One file per paper; one line in METHODS makes a method known to recipes, command line, docs and tests.

The lines are strings so that looking at the list (help, recipe checks) does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any, cast

from potstill.errors import UsageError, nearest

if TYPE_CHECKING:
    from potstill.methods.base import Method

METHODS: dict[str, str] = {
    "supervised": "potstill.methods.supervised:Supervised",
    "kd": "potstill.methods.kd:KD",
    "fitnet": "potstill.methods.fitnet:FitNet",
}


def list_methods() -> list[str]:
    """Names that recipes accept under ``method.name``, sorted."""
    return sorted(METHODS)


def method_class(name: str) -> "type[Method]":
    """The class behind a name.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r}{nearest(name, METHODS) or '.'} Known: {', '.join(list_methods())}")
    module, _, attribute = METHODS[name].partition(":")
    return cast("type[Method]", getattr(importlib.import_module(module), attribute))


def create_method(name: str, **options: Any) -> "Method":
    """Build a method by name; ``options`` are the keywords of its ``__init__``.

    Raises:
        UsageError: unknown name, unknown or missing option, value out of range.
    """
    from potstill.methods.catalog import check_method

    problems = check_method(name, options)
    if problems:
        raise UsageError("\n".join(problem.text(name) for problem in problems))
    return method_class(name)(**options)
