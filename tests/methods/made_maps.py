"""Outputs of made-up networks, for methods that read feature maps."""

import torch
from torch import Tensor, nn

from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.types import Batch, Outputs

CLASSES = 5


def outputs(*shapes: tuple[int, int], batch: int = 4, embedding: int = 6, grad: bool = False) -> Outputs:
    """Random outputs whose maps have the given (channels, size); ``grad`` makes them those of a student."""
    maps = tuple(torch.randn(batch, channels, size, size).relu().requires_grad_(grad) for channels, size in shapes)
    return Outputs(
        torch.randn(batch, CLASSES).requires_grad_(grad),
        maps=maps,
        embedding=torch.randn(batch, embedding).requires_grad_(grad),
    )


def labelled(batch: int = 4) -> Batch:
    return Batch(torch.zeros(batch, 3, 2, 2), torch.arange(batch) % CLASSES)


def built(
    method: Method, student: Outputs, teacher: Outputs, *, norms: tuple[nn.BatchNorm2d | None, ...] = ()
) -> Method:
    """The method, sized by these outputs, in its first epoch of 270."""
    facts = TrainingInfo(classes=CLASSES, batch_size=len(student.logits))
    method.build(NetworkInfo(student), NetworkInfo(teacher, norms=norms), facts)
    method.start_epoch(0, 270)
    return method


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
