"""The state of training in one file: its SHA-256, then safetensors.

Tensors as safetensors, everything else as JSON in its header: opening a checkpoint runs no code.  The digest is checked
before anything is parsed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from potstill.errors import ArtifactError
from potstill.sealed import read_sealed, write_sealed


def save_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    alike: Mapping[str, str] | None = None,
    keep_previous: bool = False,
) -> None:
    """Write named tensors and JSON facts, whole or not at all.

    Args:
        path: NAME.checkpoint.
        tensors: on any device.
        facts: JSON values.
        alike: name of a tensor -> name of another; where every bit of them is the same, they are stored once.
        keep_previous: the older file stays as NAME-previous.checkpoint, should this one be damaged later.

    Raises:
        StorageError: it could not be written; the older file is untouched.
    """
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    same = {name: other for name, other in (alike or {}).items() if _same_bits(flat[name], flat[other])}
    for name in same:
        del flat[name]
    seen: set[int] = set()
    for key, value in flat.items():  # safetensors refuses tied weights: each name gets bytes of its own
        if value.numel() and value.data_ptr() in seen:
            flat[key] = value.clone()
        seen.add(value.data_ptr())
    metadata = {"facts": json.dumps(facts), "same": json.dumps(same)}
    write_sealed(path, safetensors.torch.save(flat, metadata=metadata), keep_previous=keep_previous)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        ArtifactError: missing, cut short or changed; names the newest intact older one.
    """
    payload = read_sealed(path)
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        facts, same = (json.loads(header["__metadata__"][name]) for name in ("facts", "same"))
        tensors = safetensors.torch.load(payload)
        return tensors | {name: tensors[other].clone() for name, other in same.items()}, facts
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no checkpoint of this version: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name and JSON facts."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{key}"] = value
            else:
                plain[f"{parameter}.{key}"] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a packed state back."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *facts["plain"].items()]:
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


def pack_random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put packed generator states back."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{"a": t}`` -> ``{"prefix/a": t}``."""
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def within(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``under``: the tensors of one prefix, without it."""
    start = f"{prefix}/"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict whose tensors no longer change with the module."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Of contiguous tensors on the CPU; unlike ``==``, 0 is not -0, and what is not a number equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
