"""ViT and ResNet classifiers of Hugging Face transformers, under the names of timm's networks of the same kind."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
    """Return the tensors under timm's names; None for other kinds of networks.

    The three attention matrices of ViT are concatenated, as in timm.
    """
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
