"""Checkpoints of other repositories: identify their network, and translate the names of their tensors.

Names are translated by maps of well-known CIFAR repositories.  Weights under other names are assigned by order and
shape, if all shapes agree; only the accuracy on val shows then whether it is the same network.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potstill.errors import UsageError
from potstill.input_spec import Triple
from potstill.models.registry import FAMILIES, build_model, is_model
from potstill.models.state_dict import Checkpoint, is_head, read_checkpoint

State = dict[str, Tensor]


@dataclass(frozen=True)
class KeyMap:
    """The names that repositories give to the layers of a network."""

    repositories: str
    rules: tuple[tuple[str, str], ...]  # regular expressions and what takes their place; all of them, in order

    def translate(self, state: Mapping[str, Tensor]) -> State:
        """Return the tensors under potstill's names."""
        return {self._rename(key): value for key, value in state.items()}

    def _rename(self, key: str) -> str:
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


_HEAD = (r"^(linear|fc|classifier)\.", "head.")
KEY_MAPS = (
    KeyMap(
        "akamaster/pytorch_resnet_cifar10 and kuangliu/pytorch-cifar",
        (
            (r"^conv1\.", "stem.0."),
            (r"^bn1\.", "stem.1."),
            (r"^layer(\d)\.", r"stage\1."),
            (r"^linear\.", "head."),
        ),
    ),
    KeyMap(
        "RepDistiller, mdistiller and chenyaofo/pytorch-cifar-models",
        (
            (r"^conv1\.", "stem.0."),
            (r"^bn1\.", "stem.1."),
            (r"^layer(\d)\.", r"stage\1."),
            (r"\.downsample\.", ".shortcut."),
            _HEAD,
        ),
    ),
    KeyMap(
        "RepDistiller, mdistiller and xternalz/WideResNet-pytorch",
        (
            (r"^conv1\.", "stem."),
            (r"^block(\d)\.layer\.", r"stage\1."),
            (r"\.convShortcut\.", ".shortcut."),
            (r"^bn1\.", "bn."),
            _HEAD,
        ),
    ),
    KeyMap(
        "RepDistiller and mdistiller",
        (*((rf"^block{at}\.", f"stage{at + 1}.") for at in (4, 3, 2, 1, 0)), _HEAD),
    ),
)
# Normalisation of CIFAR images in nearly all repositories, by number of classes; akamaster's uses ImageNet's.
CIFAR_NORMALISATION: Mapping[int, tuple[Triple, Triple]] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(frozen=True)
class Converted:
    """A checkpoint's weights under the names of potstill's network."""

    state: State
    notes: tuple[str, ...] = ()
    normalisation: tuple[Triple, Triple] | None = None  # of their training, if known
    fits: bool = True  # False: names or shapes differ from the network's


def convert(checkpoint: Checkpoint, architecture: str, own: Mapping[str, Tensor]) -> Converted:
    """Return a checkpoint's weights under the names of the state dict ``own``; as they are where nothing fits."""
    for convention in (_convert_by_names, _convert_by_map, _convert_by_order):
        if converted := convention(checkpoint, architecture, own):
            return converted
    return Converted(checkpoint.tensors, fits=False)


def _convert_by_names(checkpoint: Checkpoint, architecture: str, own: Mapping[str, Tensor]) -> Converted | None:
    prefix = checkpoint.prefix
    spelled = {f"{prefix}{key}": value for key, value in checkpoint.tensors.items()}  # perhaps the network's own
    for state in (checkpoint.tensors, *([spelled] if prefix else [])):
        if _fits(own, state):
            return Converted(state, normalisation=checkpoint.normalisation)
    return None


def _convert_by_map(checkpoint: Checkpoint, architecture: str, own: Mapping[str, Tensor]) -> Converted | None:
    translated = translate_names(checkpoint.tensors)
    if translated is not None and _fits(own, translated):
        note = f"weights have the layer names of Hugging Face transformers, read as {architecture}"
        return Converted(translated, (note,), checkpoint.normalisation)
    for key_map in KEY_MAPS:
        if _fits(own, state := key_map.translate(checkpoint.tensors)):
            note = f"weights have the layer names of {key_map.repositories}, read as {architecture}"
            three_stages = not any(key.startswith("stage4.") for key in own)
            if key_map is KEY_MAPS[0] and three_stages:  # akamaster's
                return Converted(state, (note,))
            return _with_cifar_normalisation(state, note, architecture, own)
    return None


def _convert_by_order(checkpoint: Checkpoint, architecture: str, own: Mapping[str, Tensor]) -> Converted | None:
    theirs, ours = ([key for key in each if not _is_counter(key)] for each in (checkpoint.tensors, own))
    if not checkpoint.ordered or len(theirs) != len(ours):
        return None
    state = {our: checkpoint.tensors[their] for our, their in zip(ours, theirs, strict=True)}
    if not _fits(own, state):
        return None
    note = (
        f"weights have layer names that are not known ({theirs[0]}, ...) and were assigned to {architecture} by order "
        "and shape: only the accuracy on val shows whether it is the same network"
    )
    return _with_cifar_normalisation(state, note, architecture, own)


def _with_cifar_normalisation(state: State, note: str, architecture: str, own: Mapping[str, Tensor]) -> Converted:
    known = None
    if architecture.startswith("cifar/") and (
        known := CIFAR_NORMALISATION.get(int(state["head.weight"].shape[0]) if "head.weight" in state else 0)
    ):
        mean, std = (", ".join(f"{value:g}" for value in each) for each in known)
        note += f"; images are normalised as those repositories do, mean {mean}, std {std}"
    return Converted(state, (note,), known)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    if any(key not in own for key in state) or any(key not in state and not _is_counter(key) for key in own):
        return False
    other = [key for key, value in state.items() if value.shape != own[key].shape]
    return not other or is_head(dict(own), dict(state), other, int(own[other[0]].shape[0]))


_PROBE_CLASSES = 7  # of candidates; any number will do
_FEWEST_TENSORS = 16  # of a network that can be recognised: AlexNet's


def identify_network(path: Path) -> str:
    """Return the name of the network whose weights a file holds.

    What the file records about itself is tried first (``arch`` and ``args`` of training scripts, ``config.json``), then
    its name, then all of ``cifar/`` and ``torchvision/``.  Only names and shapes of tensors are compared.

    UsageError: no known network has such weights; describes them.
    """
    checkpoint = read_checkpoint(path)
    groups: tuple[Callable[[], list[str]], ...] = (  # the later ones cost seconds
        lambda: [name for name in (*checkpoint.architectures, *_transformers_network(checkpoint)) if is_model(name)],
        lambda: [f"cifar/{name}" for name in (*FAMILIES["cifar"].names(), *_wide_resnets(checkpoint))],
        lambda: [name for name in _names_in(path) if is_model(name)],
        lambda: [f"torchvision/{name}" for name in FAMILIES["torchvision"].names()],
    )
    for names in groups if len(checkpoint.tensors) >= _FEWEST_TENSORS else ():
        candidates = names()
        for convention in (
            _convert_by_names,
            _convert_by_map,
            _convert_by_order,
        ):  # names are more reliable than shapes
            if found := next((name for name in candidates if convention(checkpoint, name, _shapes(name))), None):
                return found
    raise UsageError(
        f"{path} contains weights only; give their architecture as ARCHITECTURE@{path}\n{_describe(checkpoint)}"
    )


@functools.cache  # building all candidates takes seconds
def _shapes(name: str) -> State:
    try:
        with torch.device("meta"):
            return build_model(name, _PROBE_CLASSES, size=32 if name.startswith("cifar/") else 224).state_dict()
    except (UsageError, RuntimeError, NotImplementedError):  # a few compute their widths with tensors
        return {}


def _transformers_network(checkpoint: Checkpoint) -> list[str]:
    translated = translate_names(checkpoint.tensors)
    name = None if translated is None else network_name(translated)
    return [] if name is None else [name]


def _wide_resnets(checkpoint: Checkpoint) -> list[str]:
    convolutions = [value for value in checkpoint.tensors.values() if value.ndim == 4]
    if not convolutions:
        return []
    width, rest = divmod(max(int(value.shape[0]) for value in convolutions), 64)
    blocks, odd = divmod(len(convolutions) - 1 - (2 if width == 1 else 3), 6)
    return [f"wrn_{6 * blocks + 4}_{width}"] if not rest and not odd and width and blocks > 0 else []


def _names_in(path: Path) -> list[str]:
    """Return networks that the name of the file or its folder contains: ``resnet18-f37072fd.pth``."""
    stems = [path.name if path.is_dir() else path.stem, path.parent.name]
    found = [stem.partition(sign)[0] for stem in stems for sign in ("\0", ".", "-")]
    return list(dict.fromkeys(f"{family}/{name}" for name in found if name for family in ("timm", "torchvision")))


def _describe(checkpoint: Checkpoint) -> str:
    tensors = {key: value for key, value in checkpoint.tensors.items() if not _is_counter(key)}
    total = sum(value.numel() for value in tensors.values())
    ends = [f"{key} {tuple(value.shape)}" for key, value in tensors.items()]
    shown = ", ".join(ends if len(ends) < 5 else [*ends[:2], "...", *ends[-2:]])
    order = "" if checkpoint.ordered else "; a safetensors file does not keep the order of the layers"
    return f"It has {len(tensors)} tensors of {total:,} values in all: {shown}{order}"


_VIT_RULES = (
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^vit\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^vit\.encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^vit\.encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^vit\.encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_ATTENTION = re.compile(r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
_VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
_VIT_DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24}


def translate_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors under timm's names, ViT's attention matrices in one; None for other kinds of networks."""
    if "vit.embeddings.cls_token" in tensors:
        return _translate_vit(tensors)
    if "resnet.embedder.embedder.convolution.weight" in tensors:
        return {_resnet_name(key): value for key, value in tensors.items()}
    return None


def network_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of timm's network with these tensors; None if timm has none of these sizes."""
    if "pos_embed" in tensors:
        size = _VIT_WIDTHS.get(tensors["pos_embed"].shape[-1])
        if size is None or _count(tensors, r"blocks\.(\d+)\.norm1\.weight") != _VIT_DEPTHS[size]:
            return None
        patch = tensors["patch_embed.proj.weight"].shape[-1]
        pixels = patch * round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
        return f"timm/vit_{size}_patch{patch}_{pixels}"
    blocks = tuple(_count(tensors, rf"layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3, 4))
    bottlenecks = any(".conv3." in key for key in tensors)
    depths: dict[tuple[bool, tuple[int, ...]], int] = {
        (False, (2, 2, 2, 2)): 18,
        (False, (3, 4, 6, 3)): 34,
        (True, (3, 4, 6, 3)): 50,
        (True, (3, 4, 23, 3)): 101,
        (True, (3, 8, 36, 3)): 152,
    }
    depth = depths.get((bottlenecks, blocks))
    return None if depth is None else f"timm/resnet{depth}"


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in tensors)


def _translate_vit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    attention: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := _ATTENTION.fullmatch(key):
            attention.setdefault((match[1], match[3]), {})[match[2]] = value
            continue
        name = key
        for pattern, replacement in _VIT_RULES:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    for (layer, kind), parts in attention.items():
        if len(parts) == 3:
            found[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return found


def _resnet_name(key: str) -> str:
    key = re.sub(r"^resnet\.embedder\.embedder\.convolution\.", "conv1.", key)
    key = re.sub(r"^resnet\.embedder\.embedder\.normalization\.", "bn1.", key)
    key = re.sub(r"^classifier\.1\.", "fc.", key)
    match = re.fullmatch(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)\.(convolution|normalization)\.(.+)", key)
    if match is None:
        return key
    stage, block, layer, kind, rest = int(match[1]) + 1, match[2], match[3], match[4], match[5]
    if layer == "shortcut":
        name = f"downsample.{0 if kind == 'convolution' else 1}"
    else:
        name = f"{'conv' if kind == 'convolution' else 'bn'}{int(layer.removeprefix('layer.')) + 1}"
    return f"layer{stage}.{block}.{name}.{rest}"
