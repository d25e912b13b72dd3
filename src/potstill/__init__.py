"""Knowledge distillation of image classifiers, with a fair comparison to training without a teacher.

Three layers, each usable alone: ``potstill.functional`` (losses), ``Distiller`` (for a training loop of your own) and
``potstill.run`` (teacher, baseline, distilled student, report).
"""

import importlib
from typing import TYPE_CHECKING, Any

from potstill.methods import METHODS

if TYPE_CHECKING:
    from potstill.api import load as load
    from potstill.api import run as run
    from potstill.distillation.distiller import Distiller as Distiller
    from potstill.export.predict import predict as predict
    from potstill.methods import create_method as create_method
    from potstill.models.factory import create_model as create_model


__version__ = "0.1.0"


# Imported at first use: `potstill --help` must not wait for torch.
_HOMES = {
    "Distiller": "potstill.distillation.distiller",
    "create_method": "potstill.methods",
    "create_model": "potstill.models.factory",
    "load": "potstill.api",
    "predict": "potstill.export.predict",
    "run": "potstill.api",
} | {target.partition(":")[2]: target.partition(":")[0] for target in METHODS.values()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
