"""A network whose outputs are those of other classes: chosen, in another order, or several of them as one class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.models.registry import build_model


@dataclass(frozen=True)
class OutputGroups:
    """The outputs of a network that belong to each class, by number from 0; none belongs to two."""

    outputs: int  # how many the network has
    groups: tuple[tuple[int, ...], ...]  # for each class

    def __post_init__(self) -> None:
        every = [each for group in self.groups for each in group]
        if not all(self.groups) or len(set(every)) < len(every) or not all(0 <= each < self.outputs for each in every):
            raise ValueError(f"each class needs outputs of its own from 0 to {self.outputs - 1}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OutputGroups":
        """Return the object from the result of ``as_dict``."""
        return cls(int(values["outputs"]), tuple(tuple(map(int, group)) for group in values["groups"]))

    def as_dict(self) -> dict[str, Any]:
        """Return the object as JSON values."""
        return {"outputs": self.outputs, "groups": [list(group) for group in self.groups]}


class GroupedOutputs(nn.Module):
    """A network with other classes than its own outputs; each class has one or several outputs.

    The logit of a class is the logsumexp of its outputs' logits, so that its probability is the sum of theirs.

    Example:
        >>> network = GroupedOutputs(nn.Identity(), OutputGroups(4, ((0, 3), (1,))))
        >>> network(torch.tensor([[0.0, 0.0, 9.0, 0.0]])).softmax(dim=1)
        tensor([[0.6667, 0.3333]])
    """

    rows: Tensor

    def __init__(self, network: nn.Module, groups: OutputGroups) -> None:
        super().__init__()
        self.network, self.sizes = network, tuple(map(len, groups.groups))
        rows = torch.tensor([row for group in groups.groups for row in group])
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        logits: Tensor = self.network(images)[:, self.rows]
        if max(self.sizes) == 1:
            return logits
        starts = [sum(self.sizes[:at]) for at in range(len(self.sizes))]
        parts = [logits[:, start : start + size] for start, size in zip(starts, self.sizes, strict=True)]
        return torch.stack([part.logsumexp(dim=1) for part in parts], dim=1)


def choose_rows(module: nn.Module, architecture: str, rows: Sequence[int], *, size: int) -> nn.Module:
    """Return the same network of a library with these rows of its head, in order."""
    index = torch.tensor(rows)
    with torch.random.fork_rng(devices=[]):
        chosen = build_model(architecture, len(rows), size=size)
        other = build_model(architecture, len(rows) + 1, size=size).state_dict()
    head = {name for name, value in chosen.state_dict().items() if value.shape != other[name].shape}
    chosen.load_state_dict(
        {name: value[index] if name in head else value for name, value in module.state_dict().items()}
    )
    return chosen.train(module.training)
