"""What a result may depend on besides the recipe: versions, hardware, source digest and git commit.

Of a git repository only the commit is read, with a time-out; no code of it is run.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess  # nosec B404 # git, with a fixed command line, see below
import sys
from pathlib import Path
from typing import Any

import torch

import potstill
from potstill.config.recipe import Recipe
from potstill.training.devices import Compute

_GIT_TIMEOUT = 2.0


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Return the commit, and whether tracked files differ from it.

    Returns:
        ``{"commit": 40 hex digits, "changed": bool}``; None without git, repository or commit, or
        after two seconds.
    """
    commit = _run_git(folder, "rev-parse", "--verify", "HEAD")
    status = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    return {"commit": commit.strip(), "changed": bool(status.strip())}


def _run_git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None or not folder.is_dir():
        return None
    # A repository's settings may name programs that git starts: a file monitor, hooks.
    nothing = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(  # nosec B603 # no shell, no user input but the folder's name
            [program, "-C", str(folder), *nothing, *arguments],
            capture_output=True,
            timeout=_GIT_TIMEOUT,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")


def describe_environment(recipe: Recipe, recipe_text: str, fingerprint: str, compute: Compute) -> dict[str, Any]:
    """Return versions, hardware, threads, device, seeds, hashes of recipe and data; no user or host names."""
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
        "source_sha256": _source_digest(),
        "git": {"here": git_state(Path.cwd()), "potstill": git_state(Path(potstill.__file__).parent)},
    }


@functools.cache
def _source_digest() -> str | None:
    """Return the SHA-256 of potstill's modules, including uncommitted changes; None if they are no files."""
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
    """Return the processor's model name; "" if unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
