"""Networks of libraries: ``timm/NAME``, or NAME alone, and ``torchvision/NAME``.

timm has CNNs and transformers, torchvision image classifiers.  Both take seconds to import, so they are imported at
first use.
"""

from pathlib import Path
from typing import Any, cast

from torch import nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple
from potstill.models import state_dict
from potstill.models.pretrained import download_from_hub, download_from_url

# In training these give (logits, auxiliary logits); here forward gives logits, so they are built without.
# `transform_input` is on, as with torchvision's own weights: one name must always be one function.
_WITH_AUXILIARY_LOGITS = {"googlenet", "inception_v3"}


class Timm:
    """All image models of timm."""

    def names(self) -> list[str]:
        import timm

        return cast("list[str]", timm.list_models())

    def is_model(self, name: str) -> bool:
        """Return whether timm has a network of this name, with or without a tag, as in ``resnet18.a1_in1k``."""
        import timm

        if ":" in name or "/" in name:  # timm would fetch these from a hub or read them from a folder
            return False
        return timm.is_model(name) and ("." not in name or timm.models.is_model_pretrained(name))

    def build(self, name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
        import timm

        return cast(
            nn.Module, timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **size_arguments(name, size))
        )

    def own_size(self, name: str) -> int | None:
        config = _config(name)
        return int(config.input_size[-1]) if config else None

    def normalisation(self, name: str) -> tuple[Triple, Triple]:
        config = _config(name)
        return (config.mean, config.std) if config else (InputSpec.mean, InputSpec.std)

    def pretrained(self, name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
        import timm

        config = _config(name)
        if config is None or not config.has_weights:
            raise UsageError(f"timm publishes no weights for {name!r}; leave weights out to train it from scratch")
        path = _weights_file(name, config)
        if config.custom_load == "hf" if config.hf_hub_id else config.custom_load:  # of its own, such as JAX's .npz
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


class Torchvision:
    """The image classifiers of torchvision."""

    def names(self) -> list[str]:
        from torchvision import models

        # Without `module`, detection, segmentation, video and quantized networks are listed as well.
        return cast("list[str]", models.list_models(module=models))

    def is_model(self, name: str) -> bool:
        return name in self.names()

    def build(self, name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
        from torchvision import models

        module = cast(nn.Module, models.get_model(name, weights=None, num_classes=num_classes, **_options(name, size)))
        if in_chans != 3:
            _replace_first_convolution(module, in_chans)
        return module

    def own_size(self, name: str) -> int | None:
        weights = _default_weights(name)
        return None if weights is None else int(weights.transforms().crop_size[0])

    def normalisation(self, name: str) -> tuple[Triple, Triple]:
        weights = _default_weights(name)
        if weights is None:
            return InputSpec.mean, InputSpec.std
        transforms = weights.transforms()
        return tuple(transforms.mean), tuple(transforms.std)

    def pretrained(self, name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
        weights = _default_weights(name)
        if weights is None:
            raise UsageError(
                f"torchvision publishes no weights for {name!r}; leave weights out to train it from scratch"
            )
        path = download_from_url(weights.url, f"the weights of 'torchvision/{name}'")
        state = state_dict.read_state_dict(path)
        if name in _WITH_AUXILIARY_LOGITS:
            state = {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
        module = self.build(name, num_classes, size, in_chans=3)
        state_dict.load_state_dict(module, state, num_classes, origin=str(path))
        return module, len(weights.meta["categories"])


def _default_weights(name: str) -> Any:
    from torchvision import models

    return getattr(models.get_model_weights(name), "DEFAULT", None)


def _options(name: str, size: int) -> dict[str, Any]:
    if name in _WITH_AUXILIARY_LOGITS:
        return {"aux_logits": False, "transform_input": True, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": size}
    if name.startswith("maxvit"):
        return {"input_size": (size, size)}
    return {}


def _replace_first_convolution(module: nn.Module, in_chans: int) -> None:
    for path, old in module.named_modules():
        if isinstance(old, nn.Conv2d):
            parent, _, child = path.rpartition(".")
            new = nn.Conv2d(
                in_chans,
                old.out_channels,
                cast("tuple[int, int]", old.kernel_size),
                cast("tuple[int, int]", old.stride),
                cast("tuple[int, int]", old.padding),
                bias=old.bias is not None,
            )
            setattr(module.get_submodule(parent), child, new)
            return
