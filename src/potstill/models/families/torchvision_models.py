"""``torchvision/NAME``: torchvision's image classifiers."""

from typing import Any, cast

from torch import nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple
from potstill.models import state_dict
from potstill.models.pretrained import download_from_url

# In training these give (logits, auxiliary logits); here forward gives logits, so they are built without.
# `transform_input` is on, as with torchvision's own weights: one name must always be one function.
_WITH_AUXILIARY_LOGITS = {"googlenet", "inception_v3"}


def names() -> list[str]:
    from torchvision import models

    # Without `module`, detection, segmentation, video and quantized networks are listed as well.
    return cast("list[str]", models.list_models(module=models))


def is_model(name: str) -> bool:
    return name in names()


def build(name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
    from torchvision import models

    module = cast(nn.Module, models.get_model(name, weights=None, num_classes=num_classes, **_options(name, size)))
    if in_chans != 3:
        _replace_first_convolution(module, in_chans)
    return module


def own_size(name: str) -> int | None:
    weights = _default_weights(name)
    return None if weights is None else int(weights.transforms().crop_size[0])


def normalisation(name: str) -> tuple[Triple, Triple]:
    weights = _default_weights(name)
    if weights is None:
        return InputSpec.mean, InputSpec.std
    transforms = weights.transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def pretrained(name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
    weights = _default_weights(name)
    if weights is None:
        raise UsageError(f"torchvision publishes no weights for {name!r}; leave weights out to train it from scratch")
    path = download_from_url(weights.url, f"the weights of 'torchvision/{name}'")
    state = state_dict.read_state_dict(path)
    if name in _WITH_AUXILIARY_LOGITS:
        state = {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    module = build(name, num_classes, size, in_chans=3)
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
    """Replace the first convolution, with which all classifiers of torchvision begin."""
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
