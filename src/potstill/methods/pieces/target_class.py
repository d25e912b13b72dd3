"""Logits split into the target class and the others; what several methods on logits start from.

A probability of 1 - p, computed so, is 0 once p rounds to 1, and its logarithm infinite.  Here the other classes are
summed in log space, so that every logarithm stays finite however sure a network is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError


def without_target(logits: Tensor, targets: Tensor) -> Tensor:
    """The other classes' logits in their order: [B, K] and class ids [B] -> [B, K - 1].

    Example:
        >>> without_target(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
        tensor([[1., 3.]])
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, others + (others >= targets[:, None]))


def target_or_not(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of "the target class" and "any other": [B, K] and class ids [B] -> [B, 2].

    Example:
        >>> target_or_not(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2])).exp()
        tensor([[0.2500, 0.7500]])
        >>> target_or_not(torch.tensor([[900.0, 0.0]]), torch.tensor([0]))
        tensor([[   0., -900.]])
    """
    target = logits.gather(1, targets[:, None])
    rest = without_target(logits, targets).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([target, rest], dim=1), dim=1)


def refuse_two_classes(method: str, classes: int) -> None:
    """Refuse methods that compare the classes other than the target where there is only one of those.

    Raises:
        UsageError: fewer than three classes.
    """
    if classes < 3:
        raise UsageError(
            f"{method} compares the classes other than the labelled one, and of {classes} classes only one is left: "
            "that term would always be 0. Use method kd"
        )
