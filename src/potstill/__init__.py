"""Knowledge distillation of image classifiers, with a fair comparison to training without a teacher.

Three layers, each usable alone: ``potstill.functional`` (losses), ``Distiller`` (for a training loop of your own) and
``potstill.run`` (teacher, baseline, distilled student, report).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.api import fit as fit
    from potstill.api import load as load
    from potstill.api import run as run
    from potstill.api import shrink as shrink
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
    "fit": "potstill.api",
    "load": "potstill.api",
    "predict": "potstill.export.predict",
    "run": "potstill.api",
    "shrink": "potstill.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__all__" or name[:1].isupper():  # the classes of methods
        from potstill.methods import method_classes

        classes = method_classes()
        if name == "__all__":
            return sorted([*_HOMES, *classes])
        if name in classes:
            return getattr(importlib.import_module(classes[name]), name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__getattr__("__all__")])
