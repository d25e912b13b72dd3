"""The operations of a view that torchvision provides, one image at a time."""

from collections.abc import Callable

from torch import Tensor

from potstill.data.settings import AugmentSettings

STRONG = (2, 10)  # operations and magnitude (of 30) of a strong view: MLLD's and CRLD's transform

Operation = Callable[[Tensor], Tensor]  # uint8 [3, S, S] -> the same


def chain(augment: AugmentSettings, *, strong: bool = False) -> list[Operation]:
    """Colours, policy and erasing, as far as asked for.

    ``color_jitter`` s: brightness, contrast and saturation by factors in [1 - s, 1 + s].  ``erasing`` p: a rectangle
    of 2 to 33 % of the area becomes black with probability p.  ``strong``: RandAugment on top of the policy.
    """
    if not (strong or augment.color_jitter or augment.policy != "none" or augment.erasing):
        return []
    from torchvision.transforms import v2  # slow to import, and most recipes do without

    operations: list[Operation] = []
    if augment.color_jitter:
        strength = augment.color_jitter
        operations.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    if augment.policy != "none":
        operations.append({"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}[augment.policy]())
    if strong:
        operations.append(v2.RandAugment(*STRONG))
    if augment.erasing:
        operations.append(v2.RandomErasing(p=augment.erasing))
    return operations
