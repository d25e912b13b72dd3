"""What a result may depend on besides the recipe."""

import hashlib
import importlib.metadata
import platform
import sys
from typing import Any

import torch

from potstill import __version__
from potstill.training.devices import Compute

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")


def describe_environment(recipe_text: str, fingerprint: str, compute: Compute) -> dict[str, Any]:
    """Versions, processor, threads, device, hashes of recipe and data; no user or host names."""
    device = compute.device
    return {
        "potstill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": "bf16" if compute.bf16 else "float32",
        "channels_last": compute.channels_last,
        "byte_order": sys.byteorder,
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest(),
        "data_fingerprint": fingerprint,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
