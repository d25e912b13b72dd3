"""How a network wants its images.  No torch here: prediction with an exported model does without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Triple = tuple[float, float, float]


RESIZE_MODES = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class InputSpec:
    """What turns decoded pixels into the images [B, 3, size, size] that a network was trained on."""

    size: int  # height and width in pixels
    mean: Triple = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: Triple = (0.229, 0.224, 0.225)
    # "crop": shorter side to size / crop_share, then the centre; "pad": longer side to size, black beside the picture;
    # "stretch": both sides to size.
    resize_mode: str = "crop"
    crop_share: float = 1.0  # share of the shorter side that the centre crop keeps


def read_input_spec(values: Mapping[str, Any]) -> InputSpec:
    """Return the spec that an export's description holds.

    Raises:
        KeyError, TypeError, ValueError: values that no version has written.
    """
    known = dict(values)
    if (mode := known.get("resize_mode", "crop")) not in RESIZE_MODES:
        raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {mode!r}")
    return InputSpec(**(known | {"mean": _triple(known["mean"]), "std": _triple(known["std"])}))


def _triple(values: Any) -> Triple:
    first, second, third = map(float, values)
    return first, second, third
