"""How a network wants its images.  No torch here: prediction with an exported model does without."""

from dataclasses import dataclass

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class InputSpec:
    """What turns decoded pixels into the images [B, 3, size, size] that a network was trained on."""

    size: int  # height and width in pixels
    mean: Triple = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: Triple = (0.229, 0.224, 0.225)
    fit: str = "crop"  # "crop": shorter side to size / crop_share, then the centre; "squash": both sides to size
    crop_share: float = 1.0  # share of the shorter side that the centre crop keeps
