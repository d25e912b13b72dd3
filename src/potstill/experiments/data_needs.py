"""Whether a method can work with the data as the recipe wants it shown."""

from potstill.errors import UsageError
from potstill.methods.base import Method


def check_data_needs(
    method: Method, *, mixes: bool, unlabeled: bool, images: int, batch_size: int, target: bool = False
) -> None:
    """Refuse what could only fail, or silently mean something else, hours later.

    Args:
        method: of the distilled stage.
        mixes: whether training images are mixed (mixup, cutmix).
        unlabeled: whether images without labels join.
        images: for training.
        batch_size: of the student's training.
        target: whether the student learns in another domain, whose images have no labels.

    Raises:
        UsageError: all conflicts, with what to do.
    """
    needs, name = method.needs, type(method).__name__
    problems = []
    if mixes and needs.second != "none":
        problems.append(
            f"{name} needs a second image for each, and mixed images have none: switch mixup and cutmix off"
        )
    if mixes and needs.index:
        problems.append(f"{name} remembers samples, and a mixed image is none of them: switch mixup and cutmix off")
    if mixes and unlabeled:
        problems.append("mixup and cutmix mix labels, which unlabeled images do not have: switch one of them off")
    if target and (reason := _why_not_unlabeled(method)):
        problems.append(f"{name} {reason}: leave data.target out, or use kd or dist")
    elif unlabeled and (reason := _why_not_unlabeled(method)):
        problems.append(f"{name} {reason}: leave data.unlabeled out, or use kd or dist")
    if needs.batch_size and images < batch_size:
        problems.append(f"{name} needs full batches, and {images} images do not fill one of {batch_size}: lower it")
    if problems:
        raise UsageError("\n".join(problems))


def _why_not_unlabeled(method: Method) -> str | None:
    needs = method.needs
    reasons = {
        "needs the label of every image": needs.labels,
        "remembers the labeled samples by their ids": needs.index,
        "compares images of the same class": needs.second == "same class",
        "needs a fixed number of images in every batch": needs.batch_size,
        "has no teacher or peer who would say something about unlabeled images": not (needs.teacher or needs.peers),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
