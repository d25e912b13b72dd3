"""Distil a large image classifier into a small one, and say honestly whether it helped.

Three layers, usable one by one: ``potstill.functional`` (losses), ``Distiller`` (in your own loop) and
``potstill.run`` (teacher, baseline, distilled, report).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from potstill.api import load as load
    from potstill.api import run as run
    from potstill.deploy.predict import predict as predict
    from potstill.distiller import Distiller as Distiller
    from potstill.methods import create_method as create_method
    from potstill.methods.fitnet import FitNet as FitNet
    from potstill.methods.kd import KD as KD
    from potstill.methods.supervised import Supervised as Supervised
    from potstill.models.create import create_model as create_model

# Imported at first use: `potstill --help` must not wait for torch.
_HOMES = {
    "Distiller": "potstill.distiller",
    "FitNet": "potstill.methods.fitnet",
    "KD": "potstill.methods.kd",
    "Supervised": "potstill.methods.supervised",
    "create_method": "potstill.methods",
    "create_model": "potstill.models.create",
    "load": "potstill.api",
    "predict": "potstill.deploy.predict",
    "run": "potstill.api",
}

__all__ = ["KD", "Distiller", "FitNet", "Supervised", "create_method", "create_model", "load", "predict", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
