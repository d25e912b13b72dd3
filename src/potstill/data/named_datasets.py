"""Data sets by name: built in, of installed packages, and from code of the user's own.

digits, fashion-mnist       a module of ``data/builtin``: ``fashion_mnist.py`` has ``fashion_mnist(settings)``, which
                            returns ``DataSplits``, and may have ``check(settings)``: cheap checks before loading
NAME                        of the entry point group potstill.datasets in an installed package
package.module:callable     code of your own, also path/file.py:callable

The callables of the last two get ``data.options`` as keyword arguments, and ``settings`` if they have a parameter of
that name. They return one torch data set of (image, label); or a mapping with ``train`` and, if it has them, ``val``,
``test`` and ``class_names``; or ``DataSplits``.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from potstill.code_references import is_code_reference, is_permitted, load_reference
from potstill.data import DataSettings, builtin
from potstill.data.splits import DataSplits
from potstill.errors import DataError, PotstillError, UsageError, did_you_mean

ENTRY_POINTS = "potstill.datasets"
DATASETS = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(builtin.__path__)))
KEYS = ("train", "val", "test", "class_names")  # of the mapping that a callable returns
_RETURNS = (
    "one data set of (image, label), or a mapping with train and, if it has them, val, test and class_names, or "
    "DataSplits"
)


def dataset_names() -> list[str]:
    """Return the names of the built-in data sets and those of installed packages."""
    return [*DATASETS, *_plugins()]


def is_dataset(name: str) -> bool:
    """Return whether ``call_dataset`` takes a name; a file or folder of the same name hides code."""
    return name in dataset_names() or (not Path(name).exists() and is_code_reference(name))


def check_dataset(settings: DataSettings) -> None:
    """Check name and options without loading images; code is imported.

    Raises:
        UsageError: wrong options, no such code, or code that has no permission.
    """
    name = settings.source
    if name not in DATASETS:
        _arguments(_find(name), settings)
    elif check := getattr(_module(name), "check", None):
        check(settings)


def call_dataset(settings: DataSettings) -> DataSplits | Mapping[str, Any]:
    """Return the data set as splits, or as a mapping with some of ``KEYS``, ``train`` among them.

    Raises:
        UsageError: as ``check_dataset``.
        DataError: the code raises, or returns something else.
    """
    name = settings.source
    if name in DATASETS:
        found: DataSplits = getattr(_module(name), name.replace("-", "_"))(settings)
        return found
    function = _find(name)
    arguments = _arguments(function, settings)
    try:
        returned = function(**arguments)
    except PotstillError:
        raise
    except Exception as error:  # whatever foreign code raises
        raise DataError(f"{name} raised {_describe(error)}") from error
    if isinstance(returned, DataSplits):
        return returned
    if not isinstance(returned, Mapping):
        if not (hasattr(returned, "__len__") and hasattr(returned, "__getitem__")) or isinstance(returned, str | tuple):
            raise DataError(f"{name} returned an object of type {type(returned).__name__}; it must return {_RETURNS}")
        return {"train": returned}
    unknown = [key for key in returned if key not in KEYS]
    if unknown or returned.get("train") is None:
        problem = f"the key {unknown[0]!r}" if unknown else "no key 'train'"
        near = did_you_mean(str(unknown[0]), KEYS) if unknown else ""
        raise DataError(f"{name} returned a mapping with {problem}{near}; its keys are {', '.join(KEYS)}")
    return returned


def _module(name: str) -> Any:
    return importlib.import_module(f"{builtin.__name__}.{name.replace('-', '_')}")


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=ENTRY_POINTS)}


def _find(name: str) -> Callable[..., Any]:
    if name in _plugins():
        point = _plugins()[name]
        try:
            found = point.load()
        except Exception as error:  # whatever a foreign package raises
            package = point.value.partition(":")[0]
            raise UsageError(
                f"the data set {name!r} of the installed package {package} cannot be loaded: {_describe(error)}"
            ) from error
    else:
        if not is_permitted(name):
            raise UsageError(
                f"the data {name} is code that would run on this machine\n"
                "Read that code; if you trust it, add --allow-code (from Python: allow_code=True)"
            )
        found = load_reference(name)
    if not callable(found):
        raise UsageError(f"{name} is an object of type {type(found).__name__}; it must be a callable that returns "
                         f"{_RETURNS}")  # fmt: skip
    return found  # type: ignore[no-any-return]


def _arguments(function: Callable[..., Any], settings: DataSettings) -> dict[str, Any]:
    """Return the keyword arguments of the call.

    Raises:
        UsageError: options that the function does not take, or lacks.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in that does not say
        return dict(settings.options)
    own = {"settings": settings} if "settings" in parameters else {}
    allowed = {key: each for key, each in parameters.items() if key != "settings" and each.kind in _BY_NAME}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    problems = [
        f"unknown option {key!r} (allowed: {', '.join(allowed) or 'none'}){did_you_mean(key, allowed)}"
        for key in settings.options
        if key not in allowed and not takes_all
    ]
    required = [key for key, each in parameters.items() if each.default is each.empty and each.kind in _REQUIRED]
    problems += [
        f"option {key} is required: --set data.options.{key}=VALUE"
        for key in required
        if key not in settings.options and key not in own
    ]
    if problems:
        raise UsageError(f"data set {settings.source!r}: {'; '.join(problems)}")
    return {**settings.options, **own}


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_REQUIRED = (*_BY_NAME, inspect.Parameter.POSITIONAL_ONLY)


def _describe(error: Exception) -> str:
    """What foreign code raised, and in which of its lines."""
    frame, place = sys.exc_info()[2], ""
    while frame is not None:
        if frame.tb_frame.f_code.co_filename != __file__:
            place = f" ({frame.tb_frame.f_code.co_filename}, line {frame.tb_lineno})"
        frame = frame.tb_next
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{f': {message}' if message else ''}{place}"
