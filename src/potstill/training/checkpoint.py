"""The state of training in one file: 64 hex digits of SHA-256, a line break, then safetensors.

Tensors as safetensors, everything else as JSON in its header: opening a checkpoint runs no code.  The digest is checked
before anything is parsed.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from potstill.artifacts import digest, read_bytes, write_bytes
from potstill.errors import ArtifactError

_DIGITS = 64


def save_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write named tensors and JSON facts, whole or not at all.

    Raises:
        StorageError: it could not be written; the older file is untouched.
    """
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    seen: set[int] = set()
    for key, value in flat.items():  # safetensors refuses tied weights: each name gets bytes of its own
        if value.numel() and value.data_ptr() in seen:
            flat[key] = value.clone()
        seen.add(value.data_ptr())
    payload = safetensors.torch.save(flat, metadata={"facts": json.dumps(facts)})
    write_bytes(path, digest(payload).encode(), b"\n", payload)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        ArtifactError: missing, cut short or changed.
    """
    data = read_bytes(path)
    recorded, payload = data[:_DIGITS], data[_DIGITS + 1 :]
    if len(data) <= _DIGITS or digest(payload).encode() != recorded or data[_DIGITS : _DIGITS + 1] != b"\n":
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one that was recorded when it was written")
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return safetensors.torch.load(payload), json.loads(header["__metadata__"]["facts"])


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
