"""The values that pass between modules, and the precision in which losses are computed.

Shape letters: B batch, K classes, C H W channels, height and width of a feature map, D embedding, N training images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


UNLABELED = -100  # in place of a label; torch's cross-entropy skips it


@dataclass
class Batch:
    """What a method may know of a batch besides the networks' outputs."""

    images: Tensor  # [B, 3, H, W], normalised for the student
    labels: Tensor  # [B], int64 class ids; UNLABELED where nobody knows
    index: Tensor | None = None  # [B], int64 sample ids: positions in the training set
    view: Tensor | None = None  # [B], int64 view numbers: which augmented version of the sample this is
    second: Tensor | None = None  # [B, 3, H, W]: other views, or other images of the same classes, as the method needs
    soft_labels: Tensor | None = None  # [B, K], shares of the classes in mixed images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> Tensor:
        """What a label loss compares with: the shares where images are mixed, else the labels."""
        return self.labels if self.soft_labels is None else self.soft_labels


class Head(NamedTuple):
    """The parameters of a network's last linear layer."""

    weight: Tensor  # [K, D]
    bias: Tensor | None  # [K]

    def __call__(self, embedding: Tensor) -> Tensor:
        """[.., D] -> [.., K]."""
        return F.linear(embedding, self.weight, self.bias)


@dataclass
class Outputs:
    """What one network said about a batch; parts that the method did not ask for are empty."""

    logits: Tensor  # [B, K], before softmax
    features: dict[str, Tensor] = field(default_factory=dict)  # tap path -> whatever that submodule put out
    maps: tuple[Tensor, ...] = ()  # each [B, C, H, W], shallow to deep; tokens as a grid
    embedding: Tensor | None = None  # [B, D], what the last linear layer reads
    head: Head | None = None
    second: "Outputs | None" = None  # the same network on ``Batch.second``
    members: "tuple[Outputs, ...]" = ()  # what each teacher said (of the student: the maps joined to each)
    parts: "tuple[Outputs, ...]" = ()  # where methods are combined: what each of them asked for

    def with_logits(self, change: Callable[[Tensor], Tensor]) -> "Outputs":
        """The same outputs with every [B, K] changed: those of second images, of each teacher, and of the parts of
        combined methods too.
        """
        return replace(
            self,
            logits=change(self.logits),
            second=None if self.second is None else self.second.with_logits(change),
            members=tuple(member.with_logits(change) for member in self.members),
            # A single part is never read.
            parts=tuple(part.with_logits(change) for part in self.parts) if len(self.parts) > 1 else (),
        )


@dataclass
class Step:
    """One forward pass of a Distiller: the student's logits and the weighted terms whose sum is minimised."""

    logits: Tensor  # [B, K]
    terms: dict[str, Tensor]  # name -> scalar
    label_terms: frozenset[str] = frozenset({"ce"})  # which of them come from labels alone

    @property
    def loss(self) -> Tensor:
        """The sum of the terms, a scalar."""
        return torch.stack(list(self.terms.values())).sum()

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """(sum of the label terms, sum of the others); None where there is none."""
        sums = []
        for from_labels in (True, False):
            chosen = [term for name, term in self.terms.items() if (name in self.label_terms) == from_labels]
            sums.append(torch.stack(chosen).sum() if chosen else None)
        return sums[0], sums[1]
