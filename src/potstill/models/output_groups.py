"""A network whose outputs are those of other classes: chosen, in another order, or several of them as one class."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.models.registry import build_model


class GroupedOutputs(nn.Module):
    """A network whose neighbouring outputs count as one class each.

    The logit of a class is the logsumexp of its outputs' logits, so that its probability is the sum of theirs.

    Args:
        network: images -> logits [B, sum of ``sizes``].
        sizes: how many outputs each of the K classes has.

    Example:
        >>> network = GroupedOutputs(nn.Identity(), [2, 1])
        >>> network(torch.tensor([[0.0, 0.0, 0.0]])).softmax(dim=1)
        tensor([[0.6667, 0.3333]])
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.network, self.sizes = network, tuple(sizes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        logits = self.network(images)
        return torch.stack([part.logsumexp(dim=1) for part in logits.split(self.sizes, dim=1)], dim=1)


def choose_outputs(
    module: nn.Module, architecture: str, groups: Sequence[Sequence[int]], *, size: int
) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the same network with a head for other classes, whose rows are taken from its own.

    Args:
        module: a network of this architecture.
        architecture: a name for ``create_model``.
        groups: for each class, which outputs of ``module`` are its own.
        size: height and width of the images in pixels.

    Returns:
        The network, and how many outputs each class has; None where each has one.
    """
    rows = torch.tensor([row for group in groups for row in group])
    sizes = tuple(map(len, groups))
    count = len(rows)
    with torch.random.fork_rng(devices=[]):
        chosen = build_model(architecture, count, size=size)
        other = build_model(architecture, count + 1, size=size).state_dict()
    head = {name for name, value in chosen.state_dict().items() if value.shape != other[name].shape}
    chosen.load_state_dict(
        {name: value[rows] if name in head else value for name, value in module.state_dict().items()}
    )
    chosen.train(module.training)
    if max(sizes) == 1:
        return chosen, None
    return GroupedOutputs(chosen, sizes).train(module.training), sizes
