"""Small trained layers that carry student features to the teacher's shape."""

from collections.abc import Sequence

from torch import Tensor, nn

from potstill.errors import UsageError


class ConvAdapter(nn.Module):
    """One convolution to the teacher's channels and size, then BatchNorm and ReLU.

    Stride 2 where the student's map is twice as large, transposed where it is half as large, else a kernel of
    ``1 + difference`` without padding: the regressor of the published FitNet numbers.

    Args:
        student: shape [B, C, H, W] of the features that come in.
        teacher: shape [B, C, H, W] of the features to be matched.

    Raises:
        UsageError: not feature maps, or sizes that this adapter cannot join.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        if len(student) != 4 or len(teacher) != 4:
            raise UsageError(
                f"a hint joins feature maps [B, C, H, W], got {list(student)} and {list(teacher)}; "
                "name layers before the pooling"
            )
        (_, inputs, height, _), (_, outputs, wanted, _) = student, teacher
        if height == 2 * wanted:
            self.conv: nn.Module = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
        elif 2 * height == wanted:
            self.conv = nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
        elif height >= wanted:
            self.conv = nn.Conv2d(inputs, outputs, kernel_size=1 + height - wanted)
        else:
            raise UsageError(
                f"no adapter from a {height} pixel map to a {wanted} pixel map; "
                "choose layers of equal size, half, or double, or a larger student map"
            )
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.relu(self.norm(self.conv(features)))
        return projected
