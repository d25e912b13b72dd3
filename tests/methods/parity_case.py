"""One reference case: its inputs and parameters as tensors, and what the authors' code made of them."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

OWN = Path(__file__).with_name("golden")  # stands in the repository
LARGE = Path(os.environ.get("POTSTILL_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))  # is there or is not


def read_index() -> list[tuple[str, dict[str, Any]]]:
    """(method, case) for every case of the repository's set, and for every other case of the large one."""
    found: dict[tuple[str, str, int], tuple[str, dict[str, Any]]] = {}
    for folder in (OWN, LARGE):
        if not (folder / "index.json").exists():
            continue
        index = json.loads((folder / "index.json").read_text())
        for method in index["methods"]:
            for case in method["cases"]:
                key = (method["method"], case["name"], case["seed"])
                found.setdefault(key, (method["method"], case | {"folder": folder}))
    return list(found.values())


class Case:
    """Inputs and parameters in one precision; those with a reference gradient require grad."""

    def __init__(self, method: str, entry: dict[str, Any], dtype: torch.dtype) -> None:
        self.name: str = entry["name"]
        self.hyper: dict[str, Any] = entry["hyperparameters"]
        self.dtype = dtype
        self.arrays = _arrays(entry["folder"] / f"{method}.npz", self.name)
        self.inputs = {
            name: self._tensor(array, grad=name in self.arrays["grad"]) for name, array in self.arrays["in"].items()
        }
        self.parameters: dict[str, nn.Parameter] = {}  # by the reference's names, once loaded

    def __contains__(self, name: str) -> bool:
        return name in self.inputs

    def __getitem__(self, name: str) -> Tensor:
        """The input ``in/<name>``."""
        return self.inputs[name]

    def many(self, name: str) -> list[Tensor]:
        """The inputs ``in/<name>.0``, ``in/<name>.1``, ..., shallow to deep."""
        count = sum(key.startswith(f"{name}.") for key in self.inputs)
        return [self.inputs[f"{name}.{position}"] for position in range(count)]

    def param(self, name: str) -> Tensor:
        """The fixed parameter ``param/<name>`` as a plain tensor."""
        return self._tensor(self.arrays["param"][name], grad=False)

    def load(self, module: M, names: dict[str, str] | None = None) -> M:
        """Copy reference parameters into ``module``, in train mode and this run's precision.

        Args:
            module: its parameters (and floating buffers) are all filled, or the test fails.
            names: part of our path -> part of theirs: the longest prefix that fits is replaced; "" fits everything.
        """
        module.to(self.dtype).train()
        prefixes = sorted((names or {"": ""}).items(), key=lambda pair: -len(pair[0]))
        for ours, parameter in module.named_parameters():
            theirs = next((new + ours[len(old) :] for old, new in prefixes if ours.startswith(old)), ours)
            value = self._tensor(self.arrays["param"][theirs], grad=False)
            with torch.no_grad():
                parameter.copy_(value.reshape(parameter.shape))
            self.parameters[theirs] = parameter
        return module

    def wanted(self, kind: str) -> dict[str, Tensor]:
        """Reference values in float64: kind is out, grad, gradparam or paper."""
        return {name: torch.as_tensor(array, dtype=torch.float64) for name, array in self.arrays[kind].items()}

    def _tensor(self, array: np.ndarray, *, grad: bool) -> Tensor:
        tensor = torch.tensor(array)
        return tensor.to(self.dtype).requires_grad_(grad) if tensor.is_floating_point() else tensor


def _arrays(path: Path, case: str) -> dict[str, dict[str, np.ndarray]]:
    arrays: dict[str, dict[str, np.ndarray]] = {
        kind: {} for kind in ("in", "param", "out", "out32", "grad", "gradparam", "paper")
    }
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            name, kind, rest = key.split("/", 2)
            if name == case:
                arrays[kind][rest] = file[key]
    return arrays
