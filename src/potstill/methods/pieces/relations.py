"""What losses on relations between the images of a batch share."""

import torch
from torch import Tensor

from potstill.errors import UsageError
from potstill.precision import at_least_float32


def products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of two matrices in at least float32, also within autocast.

    Autocast would run the product in bfloat16 although its factors are float32, and the differences of two nearly
    equal similarities would be lost.

    Args:
        left: shape [.., M, D].
        right: shape [.., N, D].

    Returns:
        Shape [.., M, N].

    Example:
        >>> products(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[11.,  2.]])
    """
    with torch.autocast(left.device.type, enabled=False):
        return at_least_float32(left) @ at_least_float32(right).transpose(-1, -2)


def refuse_single(features: Tensor, method: str) -> None:
    """Relations between images need two of them.

    Raises:
        UsageError: a batch of one.
    """
    if len(features) < 2:
        raise UsageError(
            f"{method} compares the images of a batch with each other: it needs 2 or more, got {len(features)}; "
            "raise the batch size or drop the last, smaller batch (methods without relations, such as kd, take 1)"
        )


def refuse_unequal(student: Tensor, teacher: Tensor, what: str) -> None:
    """Two features that a loss subtracts have one shape.

    Raises:
        UsageError: they have not.
    """
    if student.shape != teacher.shape:
        raise UsageError(
            f"{what} of student and teacher must have one shape, got {list(student.shape)} and {list(teacher.shape)}"
        )
