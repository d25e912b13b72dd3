"""``timm/NAME``, or NAME alone: all of timm's image models, CNNs and transformers.

timm takes seconds to import, so it is imported at first use.
"""

from pathlib import Path
from typing import Any, cast

from torch import nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple
from potstill.models import state_dict
from potstill.models.pretrained import download_from_hub, download_from_url


def names() -> list[str]:
    import timm

    return cast("list[str]", timm.list_models())


def is_model(name: str) -> bool:
    """Return whether timm has a network of this name, with or without a tag, as in ``resnet18.a1_in1k``."""
    import timm

    if ":" in name or "/" in name:  # timm would fetch these from a hub or read them from a folder
        return False
    return timm.is_model(name) and ("." not in name or timm.models.is_model_pretrained(name))


def build(name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
    import timm

    return cast(
        nn.Module, timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **size_arguments(name, size))
    )


def own_size(name: str) -> int | None:
    config = _config(name)
    return int(config.input_size[-1]) if config else None


def normalisation(name: str) -> tuple[Triple, Triple]:
    config = _config(name)
    return (config.mean, config.std) if config else (InputSpec.mean, InputSpec.std)


def pretrained(name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
    import timm

    config = _config(name)
    if config is None or not config.has_weights:
        raise UsageError(f"timm publishes no weights for {name!r}; leave weights out to train it from scratch")
    path = _weights_file(name, config)
    if _own_format(config):
        overlay: dict[str, Any] = {"file": str(path), "custom_load": True}
    else:  # read here, since older timm unpickles local files without weights_only
        overlay = {"state_dict": state_dict.read_state_dict(path), "custom_load": False}
    module = timm.create_model(
        name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **size_arguments(name, size)
    )
    module.pretrained_cfg.pop("state_dict", None)  # it would stay with the network as a second set of weights
    return cast(nn.Module, module), int(config.num_classes)


def _config(name: str) -> Any:
    import timm

    return timm.get_pretrained_cfg(name)


def size_arguments(name: str, size: int) -> dict[str, int]:
    """Return the argument ``img_size`` for networks whose weights depend on the image size (ViT, Swin, ...)."""
    config = _config(name)
    return {"img_size": size} if config and config.fixed_input_size else {}


def _weights_file(name: str, config: Any) -> Path:
    """Return the file in the cache, downloaded if missing; timm itself would retry for most of a minute."""
    if not config.hf_hub_id:
        return download_from_url(config.url, f"the weights of {name!r}")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return download_from_hub(config.hf_hub_id, files, f"the weights of {name!r}")


def _own_format(config: Any) -> bool:
    """Return whether timm reads the file itself (such as JAX's .npz)."""
    return config.custom_load == "hf" if config.hf_hub_id else bool(config.custom_load)
