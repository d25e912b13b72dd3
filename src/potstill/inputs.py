"""Convert images from one network's normalisation and size to another's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.input_spec import InputSpec


class InputConverter(nn.Module):
    """Convert images from one network's normalisation and size to another's.

    Example:
        >>> half, imagenet = InputSpec(32, (0.5,) * 3, (0.5,) * 3), InputSpec(32)
        >>> black = torch.full((1, 3, 32, 32), -1.0)  # 0 under the first normalisation
        >>> InputConverter(half, imagenet)(black)[0, 0, 0, 0].item()  # (0 - 0.485) / 0.229
        -2.1179...
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: InputSpec, target: InputSpec) -> None:
        super().__init__()
        source_mean, source_std = torch.tensor(source.mean), torch.tensor(source.std)
        target_mean, target_std = torch.tensor(target.mean), torch.tensor(target.std)
        self.size = None if source.size == target.size else target.size
        self.same = source.mean == target.mean and source.std == target.std
        self.register_buffer("scale", (source_std / target_std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", ((source_mean - target_mean) / target_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.same:
            images = images * self.scale + self.shift
        if self.size is not None:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return images
