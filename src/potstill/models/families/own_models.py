"""Networks that are not in any library: named code, entry points of installed packages, and modules given from Python.

``package.module:callable``, ``path/file.py:callable``: called with ``num_classes=K`` if it takes that, else with
nothing, it returns an ``nn.Module``; or it is an ``nn.Module`` itself.  A function that must be called with one
argument of another name is the network: it maps images to logits.  An installed package offers such callables in
the entry point group ``potstill.models``, under names of its own.  ``python/NAME`` are the modules that
``potstill.run`` was given; they are known in this process alone.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import nn

from potstill.code_references import is_code_reference, load_reference
from potstill.errors import PotstillError, UsageError
from potstill.input_spec import InputSpec, Triple
from potstill.models.families.opaque_models import FunctionNetwork

ENTRY_POINTS = "potstill.models"
GIVEN = "python/"  # prefix of modules that were given from Python

Network = nn.Module | Callable[..., Any]
_given: dict[str, tuple[Network, InputSpec | None]] = {}


@contextmanager
def given_networks(networks: Mapping[str, tuple[Network, InputSpec | None]]) -> Iterator[None]:
    """Register networks by name inside the block, each with its input specification or None."""
    former = dict(_given)
    _given.update(networks)
    try:
        yield
    finally:
        _given.clear()
        _given.update(former)


def given_input(name: str) -> InputSpec | None:
    """Return the input specification of a network given from Python."""
    return _given[name][1] if name in _given else None


def names() -> list[str]:
    return [*_plugins(), *_given]


def is_model(name: str) -> bool:
    return is_code_reference(name) or name in _given or name in _plugins()


def is_own_network(name: str) -> bool:
    """Return whether a model file's architecture is code of somebody's own, here or where the model was made."""
    return name.startswith(GIVEN) or is_model(name)


def build(name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
    """Return a new network; a module is copied, with its weights."""
    with torch.random.fork_rng(devices=[]):  # what an import draws must not decide initial weights
        found = _find(name)
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    if not callable(found):
        raise UsageError(
            f"{name} is {_a(found)}; a network is an nn.Module, or a callable that returns one: "
            "callable(num_classes=K), or callable(); or a function of images that returns logits"
        )
    if is_function_of_images(found):
        network = FunctionNetwork(found, name, size)
        network.examine(size)
        return network
    how = {"num_classes": num_classes} if _takes_num_classes(found) else {}
    call = f"{name}({', '.join(f'{key}={value}' for key, value in how.items())})"
    try:
        module = found(**how)
    except PotstillError:
        raise
    except Exception as error:  # whatever foreign code raises
        raise UsageError(f"{call} raised {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{call} returned {_a(module)}; a network is an nn.Module that maps images to logits")
    return module


def is_function_of_images(value: Any) -> bool:
    """Return whether a callable maps images to logits, and does not make a network: it needs one argument.

    Example:
        >>> is_function_of_images(lambda images: images.mean((2, 3))), is_function_of_images(lambda num_classes: None)
        (True, False)
        >>> is_function_of_images(nn.Identity), is_function_of_images(lambda: None)
        (False, False)
    """
    if isinstance(value, (type, nn.Module)) or not callable(value):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # a built-in without a signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.default is each.empty and each.kind in positional]
    return len(needed) == 1 and needed[0].name != "num_classes"


def names_function(name: str) -> bool:
    """Return whether a network's name stands for a function of images; this loads the code."""
    with torch.random.fork_rng(devices=[]):
        return is_function_of_images(_find(name))


def is_given_function(name: str) -> bool:
    """Return whether a function of images was given from Python by this name."""
    return name in _given and is_function_of_images(_given[name][0])


def own_size(name: str) -> int | None:
    spec = given_input(name)
    return None if spec is None else spec.size


def normalisation(name: str) -> tuple[Triple, Triple]:
    spec = given_input(name)
    return (InputSpec.mean, InputSpec.std) if spec is None else (spec.mean, spec.std)


def pretrained(name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
    raise UsageError(
        f"{name} is code of your own, without published weights; name a file with its state dict, or 'own' for the "
        "weights that the code gives it"
    )


def _find(name: str) -> Any:
    if name in _given:
        return _given[name][0]
    return _load_plugin(_plugins()[name]) if name in _plugins() else load_reference(name)


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=ENTRY_POINTS)}


def _load_plugin(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever a foreign package raises
        raise UsageError(
            f"the model {point.name!r} of the installed package {point.value.partition(':')[0]} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _takes_num_classes(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in without a signature
        return True
    return any(
        each.kind is each.VAR_KEYWORD or (each.name == "num_classes" and each.kind is not each.POSITIONAL_ONLY)
        for each in parameters
    )


def _a(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
