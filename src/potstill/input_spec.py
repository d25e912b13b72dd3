"""The preprocessing that a network expects.  No torch here."""

import math
from dataclasses import dataclass
from typing import Any

Triple = tuple[float, float, float]


RESIZE_MODES = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class InputSpec:
    """How decoded images become the network's input [B, 3, size, size]."""

    size: int  # height and width in pixels
    mean: Triple = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: Triple = (0.229, 0.224, 0.225)
    # "crop": shorter side to size / crop_share, then the centre; "pad": longer side to size, black beside the picture;
    # "stretch": both sides to size.
    resize_mode: str = "crop"
    crop_share: float = 1.0  # share of the shorter side that the centre crop keeps
    range: tuple[float, float] | None = None  # for decoding images of more than 8 bits; None: each by its own range

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InputSpec":
        """Invert ``dataclasses.asdict``, with JSON's lists; KeyError, TypeError or ValueError for something else."""
        mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("mean and std are three numbers each")
        ends = values.get("range")
        if ends is not None:
            low, high = map(float, ends)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"range must be two numbers, the lower one first, got {ends!r}")
            ends = (low, high)
        return cls(**(values | {"mean": mean, "std": std, "range": ends}))
