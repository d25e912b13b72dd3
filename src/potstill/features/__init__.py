"""Feature maps of networks: adapters that bring student features to the teacher's shape; in the modules all else."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError

# A kernel of 1 + difference from 56 to 7 pixels has 2,500 weights for each pair of channels.  Beyond this many weights,
# the map is averaged down first, so that the adapter does not outweigh the student.
MAX_WEIGHTS = 10_000_000


def pool_to_common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two maps [B, C, H, W] down to the smaller height and width of the two.

    Maps of equal size come back as they are.

    Example:
        >>> import torch
        >>> student, teacher = pool_to_common_size(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]), torch.zeros(1, 8, 1, 1))
        >>> student
        tensor([[[[4.]]]])
    """
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return _pool_to(student, size), _pool_to(teacher, size)


def resize_map(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map [B, C, H, W] to [B, C, *size]: averaging if it is larger, linear interpolation if smaller.

    Example:
        >>> import torch
        >>> resize_map(torch.tensor([[[[0.0, 4.0]]]]), (2, 1))  # twice as high, half as wide
        tensor([[[[2.],
                  [2.]]]])
    """
    features = _pool_to(features, (min(features.shape[2], size[0]), min(features.shape[3], size[1])))
    if tuple(features.shape[2:]) == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


class ConvAdapter(nn.Module):
    """One convolution to the teacher's channels and size, then BatchNorm and ReLU.

    Stride 2 where the student's map is twice as large, transposed where it is half as large, else a kernel of
    ``1 + difference`` without padding: the regressor of the published FitNet numbers.  It cannot join every pair of
    sizes [B, C, H, W] (or not with less than ``MAX_WEIGHTS``); there, the map is resized first and the kernel is 1x1.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        _check_maps(student, teacher)
        (_, inputs, height, width), (_, outputs, *wanted) = student, teacher
        kernel = (1 + height - wanted[0], 1 + width - wanted[1])
        self.size: tuple[int, int] | None = None  # of a resize before the convolution
        if (height, width) == (2 * wanted[0], 2 * wanted[1]):
            self.conv: nn.Module = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
        elif (2 * height, 2 * width) == (wanted[0], wanted[1]):
            self.conv = nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
        elif min(kernel) >= 1 and inputs * outputs * kernel[0] * kernel[1] <= MAX_WEIGHTS:
            self.conv = nn.Conv2d(inputs, outputs, kernel_size=kernel)
        else:
            self.size = (wanted[0], wanted[1])
            self.conv = nn.Conv2d(inputs, outputs, kernel_size=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map the student's [B, C, H, W] to the teacher's."""
        if self.size is not None:
            features = resize_map(features, self.size)
        projected: Tensor = self.relu(self.norm(self.conv(features)))
        return projected


class Projection(nn.Module):
    """A 1x1 convolution to the channels of ``teacher`` [B, C, H, W]; ``norm`` adds BatchNorm and takes the bias."""

    def __init__(
        self, student: Sequence[int], teacher: Sequence[int], *, norm: bool = False, activation: bool = False
    ) -> None:
        super().__init__()
        _check_maps(student, teacher)
        self.conv = nn.Conv2d(student[1], teacher[1], kernel_size=1, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm2d(teacher[1]) if norm else nn.Identity()
        self.relu: nn.Module = nn.ReLU() if activation else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, C, H, W] to the teacher's channels."""
        projected: Tensor = self.relu(self.norm(self.conv(features)))
        return projected


def _pool_to(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if tuple(features.shape[2:]) == size else F.adaptive_avg_pool2d(features, size)


def _check_maps(student: Sequence[int], teacher: Sequence[int]) -> None:
    if len(student) != 4 or len(teacher) != 4:
        raise UsageError(
            f"a hint joins feature maps [B, C, H, W], got {list(student)} and {list(teacher)}; "
            "name layers before the pooling"
        )
