"""What a result may depend on besides the recipe."""

import functools
import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import potstill
from potstill.experiments.git_state import git_state
from potstill.experiments.recipe import Recipe
from potstill.training.devices import Compute

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")


def describe_environment(recipe: Recipe, recipe_text: str, fingerprint: str, compute: Compute) -> dict[str, Any]:
    """Versions, processor, threads, processes, device, seeds, hashes of recipe and data; no user or host names."""
    device = compute.device
    return {
        "potstill": potstill.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": compute.processes.count,
        "precision": compute.precision,
        "channels_last": compute.channels_last,
        "byte_order": sys.byteorder,
        "seeds": {
            "seed": recipe.seed,
            "split_seed": recipe.data.split_seed,
            "augmentation_seed": recipe.augmentation_seed,
        },
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest(),
        "data_fingerprint": fingerprint,
        "source_sha256": _source(),
        "git": {"here": git_state(Path.cwd()), "potstill": git_state(Path(potstill.__file__).parent)},
    }


@functools.cache
def _source() -> str | None:
    """SHA-256 over potstill's own modules, changes that nobody committed among them; None where they are no files."""
    folder, sums = Path(potstill.__file__).parent, hashlib.sha256()
    try:
        for path in sorted(folder.rglob("*.py")):
            sums.update(
                path.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
            )
    except OSError:
        return None
    return sums.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Its model, as the system says it; "" where it does not."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
