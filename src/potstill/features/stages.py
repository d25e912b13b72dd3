"""The anatomy of any classifier: its stages and its head, found with one forward pass."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from potstill.errors import UsageError, nearest
from potstill.features.before import Before, before
from potstill.features.heads import find_head, first_of_heads, pooled_by
from potstill.features.layout import Grid, Layout
from potstill.features.stage_ends import stage_ends
from potstill.features.trace import Call, Trace, trace


@dataclass(frozen=True)
class Stage:
    """A feature map and where to read it.

    The map before the last activation is, as ``before`` says: the map itself ("map", there is no activation), the input
    of the module ``activation``, the input of an activation "function", the output of the module itself ("output",
    where the map is what a function makes of that), or the output of ``norm`` (networks that normalise and activate at
    the start of the next block).
    """

    path: str  # unique within a network; the module's own, unless it is called several times or activated outside
    channels: int
    height: int
    width: int
    layout: Layout
    prefix: int = 0  # class, distillation and register tokens before those of the grid
    activation: str | None = None  # path of the module whose input is the map before activation
    norm: str | None = None  # path of the BatchNorm2d in front of the activation, or of the map where there is none
    module: str = ""  # path as in ``named_modules()``
    call: int | None = None  # which call of the module, from 0; None where there is but one
    activated: bool = False  # whether the map is what an activation function made of the module's output
    before: Literal["map", "activation", "function", "output", "norm"] = "map"
    copied: bool = False  # whether the network writes into the map later, so that it must be copied when read
    copied_before: bool = False  # the same for the map before activation

    @property
    def grid(self) -> Grid:
        """Its shape, and how the module's output holds it."""
        return Grid(self.layout, self.channels, self.height, self.width, self.prefix)


@dataclass(frozen=True)
class Anatomy:
    """What a network consists of, as far as distillation asks."""

    stages: tuple[Stage, ...]  # shallow to deep, without the stem
    head: str | None  # path of the nn.Linear whose output is the logits
    embedding: int | None  # length of the embedding: the input of ``embedder``
    pooled: bool  # whether the head reads the mean of the last stage's map over its places
    embedder: str | None = None  # path of the head; of the first, where the logits are the mean of several
    image: tuple[int, int] = (0, 0)  # height and width of the images


def stages(model: nn.Module, example: Tensor) -> Anatomy:
    """The anatomy of a classifier, from one forward pass in eval mode over the first two images.

    A stage ends with the last module whose output has its resolution, seen from outside: of a whole residual stage, not
    of its convolutions; of a plain network, the last activation before the pooling.  The stem is left out: whatever
    comes before the first of those blocks of which there are several.  Networks that keep one resolution, as most
    transformers, are divided into four groups of blocks.  Where the head reads the mean of a map, that map is the last
    one, so a convolution, normalisation or activation behind the last block counts as part of it; a last LayerNorm does
    not count otherwise.

    Args:
        model: images [B, 3, H, W] -> logits [B, K]; it stays as it was.
        example: images, on the model's device.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 9, 3, 1, 1),
        ...                     nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5))
        >>> anatomy = stages(net, torch.rand(2, 3, 16, 16))
        >>> [(stage.path, stage.channels, stage.height) for stage in anatomy.stages]
        [('1', 8, 16), ('4', 9, 8)]
        >>> anatomy.head, anatomy.embedding, anatomy.pooled
        ('7', 9, True)
    """
    seen = trace(model, example)
    head = find_head(seen)
    chosen = stage_ends(seen)
    last = pooled_by(seen, head, chosen)
    if last is not None:
        chosen[-1:] = [last]
    embedder = head or first_of_heads(seen)
    return Anatomy(
        stages=tuple(_stage(seen, call) for call in chosen),
        head=head.path if head else None,
        embedding=embedder.source.shape[1] if embedder is not None and embedder.source is not None else None,
        pooled=last is not None,
        embedder=embedder.path if embedder else None,
        image=seen.image,
    )


def stage_at(model: nn.Module, example: Tensor, path: str) -> Stage:
    """The stage that ends with the module ``path``, for people who know better than ``stages``.

    Args:
        model: images [B, 3, H, W] -> logits [B, K]; it stays as it was.
        example: images, on the model's device.
        path: as in ``named_modules()``, or as ``stages`` names it.  Of several calls the last counts.

    Raises:
        UsageError: no such module, or its output is no feature map.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
        >>> stage_at(net, torch.rand(2, 3, 16, 16), "0").height
        8
    """
    seen = trace(model, example)
    names = {_label(seen, call) for call in seen.calls} | {name for name, _ in model.named_modules() if name}
    if path not in names:
        first = ", ".join(sorted(names)[:6])
        raise UsageError(f"{type(model).__name__} has no layer {path!r}{nearest(path, names) or f'; it has {first}'}")
    calls = [call for call in seen.calls if path in (_label(seen, call), None if call.behind else call.path)]
    if not calls:
        raise UsageError(f"{type(model).__name__} does not use its layer {path!r}; choose another")
    if calls[-1].grid is None:
        kind = "no tensor" if calls[-1].output is None else f"of shape {list(calls[-1].output.shape)}"
        raise UsageError(f"the output of {path!r} is {kind}, no feature map; choose a layer before the pooling")
    return _stage(seen, calls[-1])


def _stage(seen: Trace, call: Call) -> Stage:
    found: Before = before(seen, call)
    grid = call.grid
    assert grid is not None
    return Stage(
        path=_label(seen, call),
        channels=grid.channels,
        height=grid.height,
        width=grid.width,
        layout=grid.layout,
        prefix=grid.prefix,
        activation=found.activation,
        norm=found.norm,
        module=call.path,
        call=call.number if seen.counts[call.path] > 1 else None,
        activated=call.behind,
        before=found.kind,
        copied=call.overwritten,
        copied_before=found.overwritten,
    )


def _label(seen: Trace, call: Call) -> str:
    path = f"{call.path}[{call.number}]" if seen.counts[call.path] > 1 else call.path
    return f"act({path})" if call.behind else path
