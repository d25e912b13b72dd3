"""Half precision is raised before a loss; float64 stays float64 for checks."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they came so.

    A log-softmax in bfloat16 keeps 3 digits: enough for a convolution, not for the difference of two logarithms.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
