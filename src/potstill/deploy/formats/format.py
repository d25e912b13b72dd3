"""What every export format offers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from potstill.deploy.description import INSIDE, Description

if TYPE_CHECKING:
    from torch import nn

Files = Mapping[str, bytes]  # suffix -> content
Answer = Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]


@dataclass(frozen=True)
class Format:
    """One way to write a network down.

    Attributes:
        convert: a network in eval mode on the CPU, images [B, 3, S, S] -> logits [B, K], to the content of one file for
            each suffix.
        open: what ``convert`` gave, as a function; None where such a file runs on other machines only.
        suffix: of the file to open.
        packages: that must be there, by the names under which they are imported.
        extra: of potstill, which brings them.
        inside: how much of the preparation can be part of the file.
        any_batch: whether a file answers batches of any size; else one image at a time.
    """

    convert: "Callable[[nn.Module, Description], Files]"
    open: Callable[[Files], Answer] | None
    suffix: str
    packages: tuple[str, ...] = ()
    extra: str = "export"
    inside: tuple[str, ...] = INSIDE
    any_batch: bool = True
