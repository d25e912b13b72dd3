"""Bare state dicts from anywhere: read without running code from them, and loaded without leaving anything out."""

import argparse
import contextlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy._core import multiarray
from torch import Tensor, nn

from potstill.errors import ArtifactError
from potstill.io import read_bytes

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # keys under which training loops keep the weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
# What training scripts keep beside the weights, and what is plain data: their settings, and numpy's numbers and arrays.
_NUMPY_FUNCTIONS = (multiarray.scalar, multiarray._reconstruct)
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    # numpy 2 and numpy 1 name the same two functions in their pickles in different ways.
    *((each, f"numpy.{core}.multiarray.{each.__name__}") for each in _NUMPY_FUNCTIONS for core in ("_core", "core")),
    *{type(np.dtype(kind)) for kind in np.typecodes["All"] if kind != "O"},  # no objects
]
_ANSI_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or a ``torch.save`` file, without wrapping keys and prefixes.

    Pickles are read with ``weights_only=True`` and no way around it, and only from uncompressed archives: a small
    compressed one could fill the memory.

    Raises:
        ArtifactError: missing, damaged, no state dict, or a pickle that holds more than tensors.
    """
    data = read_bytes(path)
    try:
        content = safetensors.torch.load(data) if path.suffix == ".safetensors" else _unpickle(data, path)
    except ArtifactError:
        raise
    except Exception as error:  # damaged bytes make these parsers raise nearly anything
        raise ArtifactError(_unreadable(data, path, error)) from error
    return _unwrap(content, path)


def load_state_dict(module: nn.Module, state: dict[str, Tensor], num_classes: int, origin: str) -> bool:
    """Copy ``state`` into ``module``; every tensor on either side must have its partner of the same shape.

    The one exception is a head for another number of classes: it keeps its random weights.

    Returns:
        Whether the head is new.

    Raises:
        ArtifactError: names some of the tensors that are missing, left over or of another shape.
    """
    own = module.state_dict()
    # Weights saved before torch 0.4.1 have no such counters; nothing is computed from them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    new_head = not missing and not unexpected and _is_head(own, state, other, num_classes)
    problems = [f"missing: {_shorten(missing)}"] if missing else []
    problems += [f"not in the network: {_shorten(unexpected)}"] if unexpected else []
    if other and not new_head:
        shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in other]
        problems += [f"of another shape: {_shorten(shapes)}"]
    if problems:
        raise ArtifactError("\n".join([f"{origin} does not hold the weights of this network", *problems]))
    module.load_state_dict({key: value for key, value in state.items() if key not in other}, strict=False)
    return new_head


def _unpickle(data: bytes, path: Path) -> Any:
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ArtifactError(f"{path} is a compressed archive, which torch.save never writes; it is not opened")
            if sum(entry.file_size for entry in entries) > len(data):  # many names for the same bytes
                raise ArtifactError(f"{path} is an archive that would become larger when it is read; it is not opened")
    with torch.serialization.safe_globals(_SAFE_GLOBALS):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unreadable(data: bytes, path: Path, error: Exception) -> str:
    """The message for a file that gave ``error``: which classes it would need, and how to convert it."""
    needed: list[str] = []
    with contextlib.suppress(Exception):  # no pickle at all, or a damaged one
        allowed = {
            each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in _SAFE_GLOBALS
        }
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        needed = sorted(name for name in set(found) - allowed if name.isprintable())
    if not needed:
        text = _ANSI_ESCAPES.sub("", str(error)).rpartition("WeightsUnpickler error:")[2].strip()
        reason = (text.splitlines() or [type(error).__name__])[0][:200]
        return (
            f"{path} cannot be read as a state dict ({reason}).\n"
            "It is damaged, or holds other objects than tensors, which are never loaded: they could run code"
        )
    return (
        f"{path} holds other objects than tensors ({_shorten(needed)}), which are never loaded: they could run code.\n"
        "If you trust the file, convert it once, with the code that it was written by at hand:\n"
        f'  checkpoint = torch.load({path.name!r}, map_location="cpu", weights_only={False})\n'
        '  torch.save(checkpoint["state_dict"], "weights.pth")  # or another key; of a whole module its '
        ".state_dict()"
    )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"{path} holds no state dict: no mapping of names to tensors in it")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if len(state) != len(content):
        others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        raise ArtifactError(f"{path} holds no bare state dict: no tensors under {_shorten(others)}")
    for prefix in PREFIXES * 2:  # twice: either may come first
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_head(own: dict[str, Tensor], state: dict[str, Tensor], keys: list[str], num_classes: int) -> bool:
    """Whether the tensors that differ do so in one way: K classes here, another number there, in the first axis."""
    there = {tuple(state[key].shape[:1]) for key in keys}
    return len(there) == 1 and all(
        own[key].shape[:1] == (num_classes,) and own[key].shape[1:] == state[key].shape[1:] for key in keys
    )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
