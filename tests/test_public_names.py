"""What `import potstill` offers is complete and documented."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import potstill
from potstill import functional, methods
from potstill.methods.base import Method
from potstill.models.registry import Family

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(potstill.__path__, "potstill.")
    if not module.name.endswith("__main__")
)


def own(module):
    """Public functions and classes that a module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def test_all_is_complete():
    assert len(potstill.__all__) == len(set(potstill.__all__))
    assert set(potstill.__all__) <= set(dir(potstill))
    for name in potstill.__all__:
        value = getattr(potstill, name)
        assert value.__name__ == name
        assert value.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        potstill.nothing  # noqa: B018


def test_all_holds_every_method():
    classes = {methods.method_class(name).__name__ for name in methods.list_own_methods()}
    assert classes <= set(potstill.__all__)


def test_importing_potstill_does_not_import_torch():
    code = "import potstill, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functional_offers_every_loss():
    losses = {}
    for info in pkgutil.iter_modules(methods.__path__, "potstill.methods."):
        losses |= {
            name: value for name, value in own(importlib.import_module(info.name)).items() if name.endswith("_loss")
        }
    assert len(losses) >= 2
    assert set(losses) <= set(functional.__all__)
    assert all(getattr(functional, name) is value for name, value in losses.items())
    for name in functional.__all__:  # what a loss is made of may stand there too
        assert getattr(functional, name).__module__.startswith("potstill.methods.")


def test_every_file_of_the_folder_has_a_method():
    files = {info.name for info in pkgutil.iter_modules(methods.__path__) if not info.ispkg}
    files -= {"base", "requirements", "schedules", "wrappers", "numerics", "documentation"}
    named = {methods.method_info(name).target for name in methods.list_own_methods()}
    assert files == {target.partition(":")[0].rpartition(".")[2] for target in named}


def test_every_public_function_and_class_is_documented():
    bare, missing = [], set()
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("potstill"):
                raise
            missing.add(error.name)  # an extra brings it
            continue
        if Path(module.__file__).read_text(encoding="utf-8").strip() and not module.__doc__:
            bare.append(name)
        family = (
            set(vars(Family)) if name.startswith(("potstill.models.families.", "potstill.models.cifar")) else set()
        )  # documented there, for all
        bare += [
            f"{name}.{key}"
            for key, value in own(module).items()
            if key not in family
            and (not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{key}("))  # as dataclass makes it
        ]
    assert bare == []
    assert len(MODULES) > 200
    assert len(missing) < 10


def test_every_method_documents_its_options():
    for name in methods.list_own_methods():
        kind = methods.method_class(name)
        assert issubclass(kind, Method)
        for option in inspect.signature(kind).parameters:
            assert f"{option}:" in kind.__doc__
