"""Every loss as a pure function of tensors, from the file of its method in ``potstill.methods``; imported at first use.

Unless its docstring states otherwise, a loss is a scalar of at least 0, the mean over the batch, in at least float32;
labels are int64 [B] class ids; no gradient reaches what comes from a teacher.  Numbers out of the range of their type,
unequal shapes, and a batch of one image where images are compared, raise UsageError.  Shapes: B images, K classes, C
channels, H x W pixels of a map, D numbers of an embedding.
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
