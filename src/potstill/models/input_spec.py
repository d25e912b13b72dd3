"""How a named network wants its images."""

from potstill.inputs import InputSpec
from potstill.models.names import resolve


def input_spec(name: str, size: int, resize_mode: str = "crop") -> InputSpec:
    """Size and fit as asked for, with the mean and standard deviation of the network's own data config.

    Raises:
        UsageError: unknown name.

    Example:
        >>> input_spec("cifar/vgg8", 32)
        InputSpec(size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize_mode='crop', ...)
    """
    family, bare = resolve(name)
    mean, std = family.normalisation(bare)
    return InputSpec(size=size, mean=mean, std=std, resize_mode=resize_mode)
