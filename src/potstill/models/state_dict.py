"""Bare state dicts from anywhere: read without running code from them, and loaded without leaving anything out."""

import argparse
import contextlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy._core import multiarray
from torch import Tensor, nn

from potstill.errors import ArtifactError, strip_ansi
from potstill.formatting import format_names
from potstill.input_spec import Triple
from potstill.io import read_bytes

# Keys of the weights in checkpoints of training scripts, by precedence.
# Averaged weights come first, since they are those that the scripts evaluate.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "net", "network", "net_state_dict", "weights",
            "params", "module")  # fmt: skip
# Of DataParallel, torch.compile, Lightning modules, and networks inside a wrapper.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "timm_model.")
_COUNTERS = ("total_ops", "total_params", "n_averaged")  # of FLOP counters and of averaging: no weights
HUB_CONFIG = "config.json"  # of a folder as on the Hugging Face hub
_HUB_PREPROCESSING = "preprocessor_config.json"
_HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MAX_CONFIG_BYTES = 50_000_000
# Plain data that training scripts save beside the weights: settings, and NumPy numbers and arrays.
_NUMPY_FUNCTIONS = (multiarray.scalar, multiarray._reconstruct)
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    # numpy 2 and numpy 1 name the same two functions in their pickles in different ways.
    *((each, f"numpy.{core}.multiarray.{each.__name__}") for each in _NUMPY_FUNCTIONS for core in ("_core", "core")),
    *{type(np.dtype(kind)) for kind in np.typecodes["All"] if kind != "O"},  # no objects
]


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and its other information on them."""

    tensors: dict[str, Tensor]  # without wrapping keys and prefix
    prefix: str = ""  # that all names had
    ordered: bool = True  # whether the tensors are in the order of the layers; safetensors sorts them
    taken_from: str = ""  # the wrapping keys, such as "state_dict"
    left: tuple[str, ...] = ()  # other keys with weights
    architectures: tuple[str, ...] = ()  # candidates, from other entries of the file
    class_names: tuple[str, ...] | None = None  # of the outputs, in order
    normalisation: tuple[Triple, Triple] | None = None  # mean and standard deviation

    @property
    def notes(self) -> list[str]:
        """Notes for the user on the choice of weights."""
        if not self.taken_from:
            return []
        beside = f", not from {' or '.join(map(repr, self.left))} beside it" if self.left else ""
        return [f"weights are taken from {self.taken_from!r}{beside}"]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of ``read_checkpoint``."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the weights in a ``.safetensors`` or a ``torch.save`` file, or in a folder of the Hugging Face hub.

    Pickles are read with ``weights_only=True`` alone, and only from uncompressed archives: a small compressed one could
    fill the memory.  ArtifactError: missing, damaged, or no state dict.
    """
    if path.is_dir():
        return _read_hub_folder(path)
    content, ordered = _read_content(path)
    checkpoint = _unwrap(content, path, ordered)
    if path.name in _HUB_WEIGHTS and (path.parent / HUB_CONFIG).is_file():
        return _with_config(checkpoint, path.parent / HUB_CONFIG)
    return checkpoint


def read_class_names(path: Path) -> tuple[str, ...] | None:
    """Return the class names in ``config.json`` of a Hugging Face folder, or of the folder of a file."""
    config = (path if path.is_dir() else path.parent) / HUB_CONFIG
    if not config.is_file() or not (path.is_dir() or path.name in _HUB_WEIGHTS):
        return None
    return _with_config(Checkpoint({}), config).class_names


def _read_content(path: Path) -> tuple[Any, bool]:
    """Return the content of a file, and whether it is in the order of writing."""
    data = read_bytes(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(data), False
        if _recognise(data):
            raise ValueError("another format")
        return _unpickle(data, path), True
    except ArtifactError:
        raise
    except Exception as error:  # damaged bytes make these parsers raise nearly anything
        raise ArtifactError(_unreadable(data, path, error)) from error


def _read_hub_folder(folder: Path) -> Checkpoint:
    file = next((folder / name for name in _HUB_WEIGHTS if (folder / name).is_file()), None)
    if file is not None:
        return read_checkpoint(file)
    parts = sorted({*folder.glob("model-*-of-*.safetensors"), *folder.glob("pytorch_model-*-of-*.bin")})
    if not parts:
        raise ArtifactError(f"{folder} has no weights: neither {' nor '.join(_HUB_WEIGHTS)}")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _read_content(part)[0]
    checkpoint = _unwrap(tensors, folder, ordered=False)
    return _with_config(checkpoint, folder / HUB_CONFIG) if (folder / HUB_CONFIG).is_file() else checkpoint


def _with_config(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add the information in ``config.json`` of timm or transformers."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("too large")
        config = json.loads(path.read_text(encoding="utf-8"))
        beside = path.with_name(_HUB_PREPROCESSING)  # of transformers; timm writes all into config.json
        images = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        if not isinstance(config, dict) or not isinstance(images, dict):
            raise TypeError("no mapping")
        own = config.get("pretrained_cfg")
        details = own if isinstance(own, dict) else config
        names = details.get("label_names") or config.get("label_names")
        by_number = config.get("id2label")
        if not names and isinstance(by_number, dict):
            names = [by_number[str(at)] for at in range(len(by_number))]
        normalisation = None
        mean, std = (details.get(key) or images.get(f"image_{key}") for key in ("mean", "std"))
        if isinstance(mean, list) and isinstance(std, list):
            (r, g, b), (deviation_r, deviation_g, deviation_b) = map(float, mean), map(float, std)
            normalisation = ((r, g, b), (deviation_r, deviation_g, deviation_b))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path} describes no network: {error}") from error
    named = config.get("architecture")
    return replace(
        checkpoint,
        architectures=(f"timm/{named}",) if isinstance(named, str) else checkpoint.architectures,
        class_names=tuple(map(str, names)) if isinstance(names, list) and names else None,
        normalisation=normalisation,
    )


def load_state_dict(module: nn.Module, state: dict[str, Tensor], num_classes: int, origin: str) -> bool:
    """Copy ``state`` into ``module``, of the same names and shapes, but for a head for another number of classes, which
    keeps its random weights; return whether there is one.  ArtifactError names tensors that do not fit.
    """
    own = module.state_dict()
    # Weights saved before torch 0.4.1 have no such counters; nothing is computed from them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    new_head = not missing and not unexpected and is_head(own, state, other, num_classes)
    problems = [f"missing: {format_names(missing, 3)}"] if missing else []
    problems += [f"not in the network: {format_names(unexpected, 3)}"] if unexpected else []
    if other and not new_head:
        shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in other]
        problems += [f"of another shape: {format_names(shapes, 3)}"]
    if problems:
        raise ArtifactError("\n".join([f"{origin} does not contain the weights of this network", *problems]))
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
    """Return the message for an unreadable file: what it seems to be, and how to convert it."""
    if kind := _recognise(data):
        what, lines = kind
        convert = "".join(f"\n  {line}" for line in lines).replace("FILE", repr(path.name))
        return f"{path} looks like {what}.{convert}"
    needed: list[str] = []
    with contextlib.suppress(Exception):  # no pickle at all, or a damaged one
        allowed = {
            each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in _SAFE_GLOBALS
        }
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        needed = sorted(name for name in set(found) - allowed if name.isprintable())
    if not needed:
        text = strip_ansi(str(error)).rpartition("WeightsUnpickler error:")[2].strip()
        reason = (text.splitlines() or [type(error).__name__])[0][:200]
        return (
            f"{path} cannot be read as a state dict ({reason}).\n"
            "It is damaged, or holds other objects than tensors, which are never loaded: they could run code"
        )
    return (
        f"{path} holds other objects than tensors ({format_names(needed, 3)}), which are never loaded: they could "
        "run code.\n"
        "If you trust the file, convert it once, with the code that it was written by at hand:\n"
        f'  checkpoint = torch.load({path.name!r}, map_location="cpu", weights_only={False})\n'
        '  torch.save(checkpoint["state_dict"], "weights.pth")  # or another key; of a whole module its '
        ".state_dict()"
    )


_SAVE_ARRAYS = 'torch.save({key: torch.from_numpy(arrays[key].copy()) for key in arrays}, "weights.pth")'
# First bytes of other formats, their names, and the lines that convert them; FILE is replaced by the name.
_OTHER_FORMATS: tuple[tuple[bytes, str, tuple[str, ...]], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself: fetch that in its repository",
        ("git lfs pull --include FILE",),
    ),
    (b"<", "a web page, not the file itself: the download gave an error page or a form", ()),
    (
        b"\x89HDF",
        "HDF5, as Keras writes it: another framework's layers. Export the network to ONNX, or write its arrays "
        "under the names of a PyTorch network",
        ("arrays = {key: h5py.File(FILE)[key][()] for key in KEYS}", _SAVE_ARRAYS),
    ),
    (b"GGUF", "GGUF, a quantized language model: it is no image classifier", ()),
    (b"\x1f\x8b", "a gzip archive: unpack it first", ("gunzip FILE   # or tar -xzf FILE",)),
    (b"BZh", "a bzip2 archive: unpack it first", ("bunzip2 FILE   # or tar -xjf FILE",)),
    (b"\xfd7zXZ", "an xz archive: unpack it first", ("unxz FILE   # or tar -xJf FILE",)),
)


def _recognise(data: bytes) -> tuple[str, tuple[str, ...]] | None:
    """Return the format of a file that torch cannot read, and the lines that convert it; None if unknown."""
    names: list[str] = []
    # Other files, and damaged archives, have no names.
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays", ("arrays = numpy.load(FILE)", _SAVE_ARRAYS)
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "TorchScript: a network with its code, which is never run",
            ('module = torch.jit.load(FILE, map_location="cpu")', 'torch.save(module.state_dict(), "weights.pth")'),
        )
    if any("exported_program" in name or name.endswith("models/model.json") for name in names):
        return (
            "torch.export's: a network with its computation",
            ("program = torch.export.load(FILE)", 'torch.save(dict(program.state_dict), "weights.pth")'),
        )
    if b"pytorch" in data[:64] and data[:1] == b"\x08":  # the first fields of ONNX: version, producer
        return (
            "ONNX: a network with its computation. Its weights alone:",
            (
                "arrays = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(FILE).graph.initializer}",
                _SAVE_ARRAYS,
            ),
        )
    start = data[:200].lstrip()
    return next(((what, lines) for begin, what, lines in _OTHER_FORMATS if start.startswith(begin)), None)


def _unwrap(content: Any, path: Path, ordered: bool) -> Checkpoint:
    architectures = _named_architectures(content)
    taken, left = list[str](), list[str]()
    while isinstance(content, Mapping):
        holders = [key for key in WRAPPERS if _holds_weights(content.get(key))]
        most = max((_count_tensors(content[key]) for key in holders), default=0)
        # An average of the parameters alone is no whole network: BatchNorm's statistics are not in it.
        holders.sort(key=lambda key: key in AVERAGED and _count_tensors(content[key]) < most)
        if not holders and not any(isinstance(value, Tensor) for value in content.values()):
            holders = [key for key, value in content.items() if isinstance(key, str) and _holds_weights(value)]
            if len(holders) > 1:
                raise ArtifactError(
                    f"{path} holds several sets of weights: {format_names(holders, 3)}. Save one of them in a file "
                    "of its own:\n"
                    f'  checkpoint = torch.load({path.name!r}, map_location="cpu")\n'
                    f'  torch.save(checkpoint[{holders[0]!r}], "weights.pth")'
                )
        if not holders:
            break
        taken.append(holders[0])
        left += holders[1:]
        content = content[holders[0]]
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"{path} holds no state dict: no mapping of names to tensors in it")
    kept = {str(key): value for key, value in content.items() if str(key).rpartition(".")[2] not in _COUNTERS}
    state = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    if len(state) != len(kept) or not state:
        others = [key for key, value in kept.items() if not isinstance(value, Tensor)]
        raise ArtifactError(f"{path} holds no bare state dict: no tensors under {format_names(others, 3)}")
    whole = ""
    while prefix := next((each for each in PREFIXES if all(key.startswith(each) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        whole += prefix
    return Checkpoint(state, whole, ordered, ".".join(taken), tuple(left), architectures)


def _holds_weights(value: Any, depth: int = 0) -> bool:
    """Return whether ``value`` is a state dict, possibly inside wrapping keys."""
    if not isinstance(value, Mapping) or depth > len(WRAPPERS):
        return False
    if any(isinstance(each, Tensor) and isinstance(key, str) for key, each in value.items()):
        return True
    return any(_holds_weights(value.get(key), depth + 1) for key in WRAPPERS)


def _count_tensors(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(_count_tensors(each) for each in value.values())
    return int(isinstance(value, Tensor) and value.ndim > 0)


def _named_architectures(content: Any) -> tuple[str, ...]:
    """Return the architectures that a checkpoint names: timm's ``arch``, torchvision's ``args.model``."""
    if not isinstance(content, Mapping):
        return ()
    settings = content.get("args")
    named = [content.get("arch")]
    named += [getattr(settings, key, None) for key in ("model", "arch")] if settings is not None else []
    found = dict.fromkeys(each for each in named if isinstance(each, str) and each.isprintable() and each)
    return tuple(f"{family}/{name}" for name in found for family in ("timm", "torchvision"))


def is_head(own: dict[str, Tensor], state: dict[str, Tensor], keys: list[str], num_classes: int) -> bool:
    """Return whether the tensors differ in the number of classes only, in the first axis."""
    there = {tuple(state[key].shape[:1]) for key in keys}
    return len(there) == 1 and all(
        own[key].shape[:1] == (num_classes,) and own[key].shape[1:] == state[key].shape[1:] for key in keys
    )
