"""What a family of networks answers; each module beside this one does, with plain functions."""

from typing import Protocol

from torch import nn

from potstill.inputs import Triple


class Family(Protocol):
    """Names here are without the family's prefix."""

    def names(self) -> list[str]:
        """The names that are listed."""
        ...

    def knows(self, name: str) -> bool:
        """Whether ``build`` takes this name (also names that are not listed, such as ``wrn_22_3``)."""
        ...

    def build(self, name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
        """A network with random weights; its forward takes images [B, in_chans, size, size], gives logits [B, K]."""
        ...

    def own_size(self, name: str) -> int | None:
        """Height and width in pixels that the network was designed for."""
        ...

    def normalisation(self, name: str) -> tuple[Triple, Triple]:
        """Mean and standard deviation of RGB in [0, 1] that its weights were trained with."""
        ...

    def pretrained(self, name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
        """The network with its published weights, and how many classes those were trained for.

        Where that number is not ``num_classes``, the head has random weights.

        Raises:
            UsageError: there are none, or they are not here and cannot be fetched; says what to do.
        """
        ...
