"""An exported model beside the network it comes from: differences, accuracy, milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.data.images import ImageSet
from potstill.deploy.description import Description
from potstill.deploy.formats.format import Answer
from potstill.deploy.inside import preparation
from potstill.deploy.onnx_model import batch
from potstill.evaluation.cost import latency
from potstill.input_spec import InputSpec

LIMIT = 1e-3  # largest difference of a logit, as a share of the largest logit where that is above 1
BATCH = 32


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from the network it comes from, on the same images."""

    images: int
    max_difference: float  # of a logit
    largest_logit: float  # of the network's, as an absolute value
    agreement: float  # share of images with the same top class
    limit: float = LIMIT

    @property
    def within(self) -> bool:
        """Whether no logit differs by more than ``limit``, times the largest logit where that is above 1."""
        return self.max_difference <= self.limit * max(1.0, self.largest_logit)  # False for NaN

    def as_json(self) -> dict[str, Any]:
        """For the facts."""
        return asdict(self)


def parity(reference: NDArray[Any], found: NDArray[Any]) -> Parity:
    """Compare logits [N, K] of the network with those of the exported model.

    Example:
        >>> parity(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [1.0, 0.5]]))
        Parity(images=2, max_difference=1.0, largest_logit=2.0, agreement=0.5, limit=0.001)
    """
    return Parity(
        len(reference),
        float(np.abs(reference.astype(np.float64) - found).max()),
        float(np.abs(reference).max()),
        float((reference.argmax(axis=1) == found.argmax(axis=1)).mean()),
    )


def torch_answer(module: nn.Module, spec: InputSpec, inside: str) -> Answer:
    """The network, in eval mode on the CPU, with its preparation, as a function of arrays."""
    whole = nn.Sequential(*preparation(spec, inside), module).eval()

    def answer(images: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            logits: NDArray[Any] = whole(torch.from_numpy(images)).float().numpy()
        return logits

    return answer


def logits_of(
    answers: Sequence[Answer], images: ImageSet, index: Sequence[int], what: Description, *, any_batch: bool = True
) -> list[NDArray[Any]]:
    """What each of several models answers to the same images: logits [N, K] each.

    Args:
        answers: that take the same input.
        images: a split.
        index: positions of N images in it.
        what: how they are prepared.
        any_batch: whether the models take many images at once.

    Raises:
        DataError: an image that cannot be decoded.
    """
    step = BATCH if any_batch and what.inside != "resize" else 1  # "resize" takes images of one size at once
    parts: list[list[NDArray[Any]]] = []
    for i in range(0, len(index), step):
        prepared = batch([images.pixels(each) for each in index[i : i + step]], what)
        parts.append([answer(prepared) for answer in answers])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share in [0, 1] of images whose top class is their label."""
    return float((logits.argmax(axis=1) == labels).mean())


class _Asked(nn.Module):
    """An exported model in the place of a network, so that both are timed alike; it gets the same image each time."""

    def __init__(self, answer: Answer, image: NDArray[Any]) -> None:
        super().__init__()
        self.answer, self.image = answer, image

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.answer(self.image))


def milliseconds(answers: Mapping[str, Answer], image: NDArray[Any], spec: InputSpec) -> dict[str, Any]:
    """p50 and p95 for one image, the models taking turns; see ``evaluation.cost.latency``.

    Args:
        answers: name -> model.
        image: a batch of one, as they take it.
        spec: of the network.
    """
    return latency({name: (_Asked(answer, image), spec) for name, answer in answers.items()}, rounds=50, warmup=10)
