"""The values that pass between modules, and the precision in which losses are computed.

Shape letters: B batch, K classes, C H W channels, height and width of a feature map, D embedding, N training images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.input_spec import InputSpec


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64.

    bfloat16 has 3 digits, which is too few for the difference of two logarithms.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def are_probabilities(outputs: Tensor, *, zeros: bool = False) -> bool:
    """Return whether rows of outputs [B, K] are positive and sum to 1, as a network's do that ends in a softmax.

    ``zeros``: some may be 0, as in answers that name one class; logits that look so are more likely in a network.
    False for tensors without values (device "meta").

    Example:
        >>> are_probabilities(torch.tensor([[0.2, 0.8]])), are_probabilities(torch.tensor([[0.2, 0.8]]).log())
        (True, False)
        >>> are_probabilities(torch.tensor([[0.0, 1.0]])), are_probabilities(torch.tensor([[0.0, 1.0]]), zeros=True)
        (False, True)
    """
    if outputs.is_meta:
        return False
    positive = (outputs >= 0 if zeros else outputs > 0).all()
    return bool(positive and ((outputs.sum(dim=1) - 1).abs() < 1e-3).all())


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64.

    Example:
        >>> widest_float(torch.device("cpu")), widest_float(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


UNLABELED = -100  # torch's ``ignore_index``


@dataclass
class Batch:
    """The inputs of a step."""

    images: Tensor  # [B, 3, H, W], normalised for the student
    labels: Tensor  # [B], int64 class ids, or UNLABELED
    index: Tensor | None = None  # [B], int64 sample ids: positions in the training set
    view: Tensor | None = None  # [B], int64 view numbers: the augmented version of each sample
    second: Tensor | None = None  # [B, 3, H, W]: other views, or other images of the same classes, as the method needs
    soft_labels: Tensor | None = None  # [B, K], shares of the classes in mixed images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> Tensor:
        """Targets of a label loss: ``soft_labels`` if images are mixed, else ``labels``."""
        return self.labels if self.soft_labels is None else self.soft_labels


class Head(NamedTuple):
    """The parameters of a network's last linear layer."""

    weight: Tensor  # [K, D]
    bias: Tensor | None  # [K]

    def __call__(self, embedding: Tensor) -> Tensor:
        """Return logits [.., K] for an embedding [.., D]."""
        return F.linear(embedding, self.weight, self.bias)


@dataclass
class Outputs:
    """The outputs of a network for a batch; those that the method does not need are empty."""

    logits: Tensor  # [B, K], before softmax
    features: dict[str, Tensor] = field(default_factory=dict)  # path of a submodule -> its output
    maps: tuple[Tensor, ...] = ()  # each [B, C, H, W], shallow to deep; tokens as a grid
    embedding: Tensor | None = None  # [B, D], input of the last linear layer
    head: Head | None = None
    second: "Outputs | None" = None  # the same network on ``Batch.second``
    members: "tuple[Outputs, ...]" = ()  # outputs of each teacher (of the student: the maps paired with each)
    parts: "tuple[Outputs, ...]" = ()  # outputs for each of combined methods

    def with_logits(self, change: Callable[[Tensor], Tensor]) -> "Outputs":
        """Apply ``change`` to all logits [B, K], including those of ``second``, ``members`` and ``parts``."""
        return replace(
            self,
            logits=change(self.logits),
            second=None if self.second is None else self.second.with_logits(change),
            members=tuple(member.with_logits(change) for member in self.members),
            # A single part is not used.
            parts=tuple(part.with_logits(change) for part in self.parts) if len(self.parts) > 1 else (),
        )


@dataclass
class Step:
    """One forward pass of a Distiller: the student's logits and the weighted terms whose sum is minimised."""

    logits: Tensor  # [B, K]
    terms: dict[str, Tensor]  # name -> scalar
    label_terms: frozenset[str] = frozenset({"ce"})  # those of labels alone

    @property
    def loss(self) -> Tensor:
        """The sum of the terms, a scalar."""
        return torch.stack(list(self.terms.values())).sum()

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Sum of the label terms and sum of the others; None if there is none."""
        sums = []
        for from_labels in (True, False):
            chosen = [term for name, term in self.terms.items() if (name in self.label_terms) == from_labels]
            sums.append(torch.stack(chosen).sum() if chosen else None)
        return sums[0], sums[1]


class InputConverter(nn.Module):
    """Convert images from one network's normalisation and size to another's.

    Example:
        >>> half, imagenet = InputSpec(32, (0.5,) * 3, (0.5,) * 3), InputSpec(32)
        >>> black = torch.full((1, 3, 32, 32), -1.0)  # 0 under the first normalisation
        >>> InputConverter(half, imagenet)(black)[0, 0, 0, 0].item()  # (0 - 0.485) / 0.229
        -2.1179...
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: InputSpec, target: InputSpec) -> None:
        super().__init__()
        source_mean, source_std = torch.tensor(source.mean), torch.tensor(source.std)
        target_mean, target_std = torch.tensor(target.mean), torch.tensor(target.std)
        self.size = None if source.size == target.size else target.size
        self.same = source.mean == target.mean and source.std == target.std
        self.register_buffer("scale", (source_std / target_std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", ((source_mean - target_mean) / target_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.same:
            images = images * self.scale + self.shift
        if self.size is not None:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return images
