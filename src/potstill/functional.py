"""Every loss as a pure function of tensors: shapes, formula and source in each docstring.

The functions live in the files of their methods in ``potstill.methods``, and are imported at first use.
"""

import importlib
from typing import Any

from potstill.methods import loss_functions


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(loss_functions())
    if name.startswith("__") or name not in loss_functions():
        raise AttributeError(f"module 'potstill.functional' has no attribute {name!r}")
    return getattr(importlib.import_module(loss_functions()[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *loss_functions()])
