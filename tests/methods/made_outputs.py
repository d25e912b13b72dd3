"""What networks might say, for tests of methods without networks."""

import torch

from potstill.methods.base import NetworkInfo
from potstill.types import Batch, Head, Outputs


def made_outputs(
    *, images: int = 6, classes: int = 3, width: int = 5, size: int = 4, seed: int = 0, grad: bool = True
) -> Outputs:
    """Random logits, one map, an embedding that is its mean, and a head; the student's with ``grad``."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, width, size, size, generator=generator).requires_grad_(grad)
    weight = torch.randn(classes, width, generator=generator).requires_grad_(grad)
    bias = torch.randn(classes, generator=generator).requires_grad_(grad)
    embedding, head = maps.mean(dim=(2, 3)), Head(weight, bias)
    outputs = Outputs(head(embedding), maps=(maps,), embedding=embedding, head=head)
    outputs.members = (outputs,)
    return outputs


def made_batch(images: int = 6, classes: int = 3) -> Batch:
    """Labels that run through the classes; sample ids 0, 1, ..."""
    labels = torch.arange(images) % classes
    return Batch(torch.zeros(images, 3, 2, 2), labels, index=torch.arange(images))


def side(outputs: Outputs) -> NetworkInfo:
    """The same outputs as an example."""
    return NetworkInfo(outputs, members=tuple(NetworkInfo(member) for member in outputs.members))
