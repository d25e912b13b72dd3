"""``create_model``: any classifier by name, images -> logits and nothing else."""

import warnings

from torch import nn

from potstill.errors import UsageError
from potstill.models.build import build, try_forward
from potstill.models.weights import load_weights


def create_model(
    name: str, num_classes: int, *, size: int = 224, in_chans: int = 3, pretrained: bool = False
) -> nn.Module:
    """A classifier whose forward takes images [B, in_chans, size, size] and gives logits [B, num_classes].

    The global random state decides the initial weights.  The network is tried on one black image, so a size that it
    cannot take is refused here and not in the first epoch.

    VGG16 at 32 or 64 px: ``vgg16`` is timm's, which averages or repeats the last feature map to 7x7 below 224 px and
    then runs its 4096-wide head as convolutions; ``torchvision/vgg16`` does the same with linear layers (its adaptive
    pooling repeats values where the map is smaller than 7x7).  Both work from 32 px and hold 134 million weights, 120
    of them in the head.  With equal weights they are the same function up to 224 px; above, timm averages the head's
    output over positions, where torchvision averages its input.  In training torchvision's drops half of the head's
    values, timm's none.  ``cifar/vgg16`` has BatchNorm and one linear head instead: 15 million weights.

    Args:
        name: as listed by ``list_models``.
        num_classes: K, at least 2.
        size: height and width of the images in pixels.
        in_chans: channels of the images.
        pretrained: with published weights (``load_weights`` also says whether the head is new).

    Raises:
        UsageError: unknown name (says the nearest ones), a size that the network cannot take, or weights that cannot
            be had.

    Example:
        >>> import torch
        >>> create_model("cifar/resnet20", 10, size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if pretrained:
        if in_chans != 3:
            raise UsageError(f"pretrained weights take images with 3 channels, got in_chans={in_chans}")
        loaded = load_weights(name, "pretrained", num_classes, size=size)
        for note in loaded.notes:
            warnings.warn(note, stacklevel=2)
        return loaded.module
    module = build(name, num_classes, size=size, in_chans=in_chans)
    try_forward(module, name, num_classes, size=size, in_chans=in_chans)
    return module
