"""One teacher or several, frozen, asked as one."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.joining.reader import Reader, Said

Combine = Literal["logits", "probabilities"]


class Teachers(nn.Module):
    """Frozen networks whose answers are combined.

    Args:
        networks: M of them; each maps its own kind of images to logits [B, K], the same classes in the same order.
        converts: for each, what makes its images of the student's.
        weights: for each, its share in the combination; equal where None.
        combine: mean the "logits", or the "probabilities" (whose logarithms are the logits then).

    Raises:
        UsageError: weights that are not one number of at least 0 for each, or all 0; an unknown combination.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        converts: Iterable[nn.Module],
        *,
        weights: Sequence[float] | None = None,
        combine: Combine = "logits",
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network.requires_grad_(False) for network in networks)
        self.converts = nn.ModuleList(converts)
        self.readers = [Reader() for _ in self.networks]
        if combine not in ("logits", "probabilities"):
            raise UsageError(f"teachers are combined by logits or probabilities, got {combine!r}")
        self.combine = combine
        shares = [1.0] * len(self.networks) if weights is None else list(weights)
        if len(shares) != len(self.networks) or min(shares) < 0 or sum(shares) <= 0:
            raise UsageError(f"give each of the {len(self.networks)} teachers a weight of at least 0, got {shares}")
        self.shares = [share / sum(shares) for share in shares]
        self.train(False)

    def __len__(self) -> int:
        return len(self.networks)

    def train(self, mode: bool = True) -> "Teachers":
        """Always eval mode: BatchNorm statistics of a teacher must not drift, and its dropout must rest."""
        return super().train(False)

    @torch.no_grad()
    def ask(self, images: Tensor) -> list[Said]:
        """What each says of images prepared for the student.

        Raises:
            UsageError: they know different numbers of classes.
        """
        if any(network.training for network in self.networks):  # somebody called teacher.train() behind our back
            self.train()
        said = [
            reader.ask(network, convert(images))
            for network, convert, reader in zip(self.networks, self.converts, self.readers, strict=True)
        ]
        classes = sorted({one.logits.shape[1] for one in said})
        if len(classes) > 1:
            raise UsageError(f"the teachers know different numbers of classes: {classes}")
        return said

    def combined(self, said: list[Said]) -> Tensor:
        """Their common logits [B, K]."""
        if len(said) == 1:
            return said[0].logits
        stacked = torch.stack([one.logits for one in said])
        # Made on a GPU, they would be waited for.
        shares = torch.tensor(self.shares, dtype=stacked.dtype).to(stacked.device, non_blocking=True).view(-1, 1, 1)
        if self.combine == "logits":
            return (shares * stacked).sum(dim=0)
        return torch.logsumexp(stacked.log_softmax(dim=2) + shares.log(), dim=0)
