"""The structure of any classifier, found with one forward pass: its stages (which calls end them, and how to read each
map before its last activation) and its head (the layer that gives the logits, and what it reads).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.errors import UsageError, did_you_mean
from potstill.features.tracing import (
    CONTAINERS,
    ActivationCall,
    ForwardTrace,
    Grid,
    Layout,
    ModuleCall,
    count_weight_layers,
    map_grid,
    map_size,
    trace_forward,
)

# A map of one pixel is a stage if a network with small images just goes on halving.  A larger reduction at once is
# flattening (timm's VGG reads its 7 x 7 map by one convolution).
_LAST_STEP = 16
_ISOTROPIC_STAGES = 4  # for blocks of equal resolution, as in common pyramids


def find_stage_ends(seen: ForwardTrace) -> list[ModuleCall]:
    """Return the calls that end the stages, shallow to deep."""
    blocks = _blocks(seen)
    body = _body(seen, blocks)
    sizes = list(dict.fromkeys(map_size(call) for call in body))
    sizes.sort(key=lambda size: -size[0] * size[1])
    chosen: list[ModuleCall] = []
    for size in sizes:
        here = [call for call in body if map_size(call) == size]
        here = [call for call in here if not any(call in stage.around for stage in chosen)]
        if size == (1, 1) and len(sizes) > 1 and here and not _goes_on(here[0]):
            continue
        while len(here) > 1 and _is_layer_norm(here[-1].module):
            here.pop()
        if here:
            fewest = min(_steps_around(call) for call in here)
            chosen.append([call for call in here if _steps_around(call) == fewest][-1])
    return _divided(chosen[0], seen, blocks) if len(chosen) == 1 else chosen


def _body(seen: ForwardTrace, blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return calls that could end a stage: they output maps, on the main path, after the stem, and not by pooling."""
    begin = _begin(seen, blocks)
    calls = [call for call in seen.calls if call.grid is not None and call.productive and not _detour(call)]
    inside_ends: dict[ModuleCall, ModuleCall] = {}  # by call: the last one inside it
    for call in calls:
        for outer in call.around:
            inside_ends[outer] = call

    def pools(call: ModuleCall) -> bool:
        return call in inside_ends and not call.behind and map_grid(inside_ends[call]).area > map_grid(call).area

    def within_block(call: ModuleCall) -> bool:  # one that itself halves the map, other than by pooling at its end
        area = map_grid(call).area
        return any(outer in halving and map_grid(outer).area < area for outer in call.around)

    halving = {block for block in blocks if not pools(block)}
    body: list[ModuleCall] = []
    largest = 0
    for call in reversed(calls):
        area = map_grid(call).area
        largest = max(largest, area)
        if call.end > begin and area == largest and not pools(call) and not within_block(call):
            body.append(call)
    return body[::-1]


def _detour(call: ModuleCall) -> bool:
    """Return whether the map is smaller than its result (squeeze and excitation), or larger than all around it."""
    area = map_grid(call).area
    for outer in call.around:
        if outer.grid is not None:
            bound = max(outer.grid.area, outer.grid_in.area) if outer.grid_in is not None else area
            if not outer.grid.area <= area <= bound:
                return True
    return False


def _steps_around(call: ModuleCall) -> int:
    """Return the number of enclosing modules that go on to a smaller map."""
    return sum(outer.grid is not None and outer.grid.area < map_grid(call).area for outer in call.around)


def _goes_on(first: ModuleCall) -> bool:
    """Return whether the first map of one pixel is computed like all before it, not by pooling."""
    return first.grid_in is not None and 1 < first.grid_in.area <= _LAST_STEP


def _blocks(seen: ForwardTrace) -> list[ModuleCall]:
    """Return the calls of the blocks that networks are built of.

    They have several layers each, and there are several of one class, or they stand in a row with such.
    """
    units = [
        call
        for call in seen.calls
        if call.grid is not None
        and not isinstance(call.module, CONTAINERS)
        and not call.behind
        and count_weight_layers(call.module) >= 2
        and not _detour(call)
    ]
    kinds = Counter(kind for kind, _ in {(type(call.module), call.path) for call in units})
    rows = {_row(seen, call) for call in units if kinds[type(call.module)] >= 2} - {None}
    blocks = [call for call in units if kinds[type(call.module)] >= 2 or _row(seen, call) in rows]
    return sorted(blocks, key=lambda call: call.start)


def _row(seen: ForwardTrace, call: ModuleCall) -> tuple[str, int] | None:
    """Return the outermost of the containers directly around a call, and its depth in there."""
    path, depth = call.path, 0
    while (outer := _parent(path)) in seen.containers:
        path, depth = outer, depth + 1
    return (path, depth) if depth else None


def _begin(seen: ForwardTrace, blocks: list[ModuleCall]) -> int:
    """When the stem is over: with the first block, or group of other layers that stands in a row with groups of blocks.

    Where blocks stand in rows, one that stands alone (in the stem, or between stages) does not count.
    """
    rows = {row for block in blocks if (row := _row(seen, block)) is not None}
    starts = [block.start for block in blocks if not rows or _row(seen, block) in rows]
    outermost = {path for path, depth in rows if depth > 1}
    starts += [call.start for call in seen.calls if call.path in seen.containers and _parent(call.path) in outermost]
    return min(starts, default=0)


def _divided(only: ModuleCall, seen: ForwardTrace, blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return the ends of four groups of blocks, for a network of constant resolution."""
    outer = [call for call in blocks if not any(other in call.around for other in blocks)]
    if not outer:  # blocks without their own class
        outer = [
            call for call in seen.calls if _parent(call.path) == only.path and count_weight_layers(call.module) >= 2
        ]
    here = [call for call in outer if call.grid is not None and map_size(call) == map_size(only)]
    rows = Counter(_row(seen, call) for call in here)  # blocks that read the class out of the tokens are another row
    here = [call for call in here if _row(seen, call) == rows.most_common(1)[0][0]]
    if len(here) < 2:
        return [only]
    groups = min(_ISOTROPIC_STAGES, len(here))
    return [here[-(-len(here) * (group + 1) // groups) - 1] for group in range(groups)]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_layer_norm(module: nn.Module) -> bool:
    return any(name in type(module).__name__ for name in ("LayerNorm", "RMSNorm", "RmsNorm"))


def find_head(seen: ForwardTrace) -> ModuleCall | None:
    """Return the linear layer whose output is the logits."""
    linear = _linear_calls(seen)
    for call in linear:
        if call.output is seen.logits:
            return call
    for call in linear:  # a wrapper has changed the type, or only copied
        if _same_logits(call.output, seen.logits):
            return call
    return None


def find_first_head(seen: ForwardTrace) -> ModuleCall | None:
    """DeiT with a distillation token gives the mean of two heads."""
    heads = [call for call in _linear_calls(seen) if call.output is not None and call.output.shape == seen.logits.shape]
    if len(heads) < 2:
        return None
    mean = torch.stack([call.output for call in heads if call.output is not None]).mean(dim=0)
    return heads[-1] if _same_logits(mean, seen.logits) else None


def _linear_calls(seen: ForwardTrace) -> list[ModuleCall]:
    """Return the linear layers with one input row per image, last first."""
    if not isinstance(seen.logits, Tensor) or seen.logits.ndim != 2:
        return []
    calls = [call for call in seen.calls if isinstance(call.module, nn.Linear) and not call.behind]
    return [call for call in reversed(calls) if call.source is not None and call.source.ndim == 2]


def _same_logits(output: Tensor | None, logits: Tensor) -> bool:
    if output is None or output.shape != logits.shape or not bool(logits.any()):
        return False
    return torch.allclose(output.to(logits), logits)


def find_pooled_map(seen: ForwardTrace, head: ModuleCall | None, chosen: Sequence[ModuleCall]) -> ModuleCall | None:
    """The call whose map the head reads the mean of; it ends in, or after, the last stage and at its resolution."""
    if head is None or head.source is None or not chosen:
        return None
    wanted = head.source.float()
    scale = float(wanted.abs().max())
    tolerance = scale * max(1e-4, 8 * torch.finfo(head.source.dtype).eps)
    for call in reversed(seen.calls):
        if call.mean is None or call.grid is None or not call.productive or call.end < chosen[-1].end:
            continue
        contains = any(call in stage.around for stage in chosen[:-1])
        if map_size(call) != map_size(chosen[-1]) or contains or call.mean.shape != wanted.shape or scale == 0:
            continue
        if torch.allclose(call.mean, wanted, rtol=0, atol=tolerance):
            return call
    return None


@dataclass(frozen=True)
class PreActivation:
    """Where to read the map before activation; see ``Stage``."""

    kind: Literal["map", "activation", "function", "output", "norm"]
    activation: str | None
    norm: str | None
    overwritten: bool


def find_pre_activation(seen: ForwardTrace, call: ModuleCall) -> PreActivation:
    """Return how to read the map before the activation that ended this call.

    In networks that activate at the start of a block, the map is a bare sum, and the next block's BatchNorm gives its
    form before activation; so the published numbers of OFD and AB on wide residual networks are made.
    """
    activated = call.activated
    if activated is not None:
        norm = _find_norm(seen, call, activated)
        if activated.path is not None:
            return PreActivation("activation", activated.path, norm, activated.overwritten)
        return PreActivation("output" if call.behind else "function", None, norm, activated.overwritten)
    if (follower := _next_block_norm(seen, call)) is not None:
        return follower
    return PreActivation("map", None, _find_norm(seen, call, None), call.overwritten)


def _next_block_norm(seen: ForwardTrace, call: ModuleCall) -> PreActivation | None:
    """BatchNorm and activation applied to the map, as the next block begins."""
    for norm in _norm_calls(seen):
        if norm.source is call.output and norm.start > call.end and _has_channels_of(norm, call):
            for activated in seen.activated:
                inside = bool(activated.around) and activated.around[-1] is norm  # timm's BatchNorm activates too
                if inside and activated.path is not None:
                    return PreActivation("activation", activated.path, norm.path, activated.overwritten)
                if activated.before is norm.output:
                    return PreActivation("norm", None, norm.path, norm.overwritten)
    return None


def _find_norm(seen: ForwardTrace, call: ModuleCall, activated: ActivationCall | None) -> str | None:
    """Return the BatchNorm whose output, perhaps with a shortcut added, is activated."""
    if activated is not None and activated.around and activated.around[-1] in _norm_calls(seen):
        found: ModuleCall | None = activated.around[-1]
    else:
        found = _source_norm(seen, call.output if activated is None else activated.before)
        found = found or _last_norm(seen, call, activated)
    return found.path if found is not None and _has_channels_of(found, call) else None


def _source_norm(seen: ForwardTrace, tensor: Tensor | None) -> ModuleCall | None:
    return next((norm for norm in reversed(_norm_calls(seen)) if norm.output is tensor), None)


def _last_norm(seen: ForwardTrace, call: ModuleCall, activated: ActivationCall | None) -> ModuleCall | None:
    """Return the last BatchNorm of the block's main path, unless a convolution follows it.

    A shortcut has a BatchNorm of its own, which may be called later: it lies deeper, or reads the block's input.
    """
    block = call
    if activated is not None and activated.around:
        block = activated.around[-1]
    elif activated is None:
        block = next(one for one in seen.calls if one.output is call.output and not one.behind)
    norms = [norm for norm in _norm_calls(seen) if block in norm.around]
    if not norms:
        return None
    convolutions = [one for one in seen.calls if isinstance(one.module, nn.Conv2d) and block in one.around]
    made_of = {id(one.output): one for one in convolutions}

    def is_shortcut(norm: ModuleCall) -> bool:
        convolution = made_of.get(id(norm.source))
        return convolution is not None and convolution.source is block.source

    found = min(norms, key=lambda norm: (is_shortcut(norm), len(norm.around), -norm.end))
    later = [one for one in convolutions if one.start > found.end and len(one.around) <= len(found.around)]
    return None if any(one.source is not block.source for one in later) else found


def _norm_calls(seen: ForwardTrace) -> list[ModuleCall]:
    return [one for one in seen.calls if isinstance(one.module, nn.BatchNorm2d) and not one.behind]


def _has_channels_of(norm: ModuleCall, call: ModuleCall) -> bool:
    assert call.grid is not None
    return getattr(norm.module, "num_features", None) == call.grid.channels


@dataclass(frozen=True)
class Stage:
    """A feature map and where to read it.

    The map before the last activation is, as ``find_pre_activation`` says: the map itself ("map", there is no
    activation), the input of the module ``activation``, the input of an activation "function", the output of the
    module itself ("output", where the map is what a function makes of that), or the output of ``norm`` (networks that
    normalise and activate at the start of the next block).
    """

    path: str  # unique within a network; the module's path, unless it is called several times or activated outside
    channels: int
    height: int
    width: int
    layout: Layout
    prefix: int = 0  # class, distillation and register tokens before those of the grid
    activation: str | None = None  # path of the module whose input is the map before activation
    norm: str | None = None  # path of the BatchNorm2d before the activation, or of the map without one
    module: str = ""  # path as in ``named_modules()``
    call: int | None = None  # index of the call of the module; None for a single call
    activated: bool = False  # whether the map is the output of an activation function after the module
    before: Literal["map", "activation", "function", "output", "norm"] = "map"
    copied: bool = False  # whether the network writes into the map later, so that it must be copied when read
    copied_before: bool = False  # the same for the map before activation

    @property
    def grid(self) -> Grid:
        """Its shape and layout."""
        return Grid(self.layout, self.channels, self.height, self.width, self.prefix)


@dataclass(frozen=True)
class NetworkStructure:
    """The structure of a network for distillation."""

    stages: tuple[Stage, ...]  # shallow to deep, without the stem
    head: str | None  # path of the nn.Linear whose output is the logits
    embedding: int | None  # length of the embedding: the input of ``embedder``
    pooled: bool  # whether the head reads the spatial mean of the last stage's map
    embedder: str | None = None  # path of the head, or of the first of several averaged heads
    image: tuple[int, int] = (0, 0)  # height and width of the images


def find_stages(model: nn.Module, example: Tensor) -> NetworkStructure:
    """Return the structure of a classifier, from one forward pass in eval mode over the first two images.

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
        >>> anatomy = find_stages(net, torch.rand(2, 3, 16, 16))
        >>> [(stage.path, stage.channels, stage.height) for stage in anatomy.stages]
        [('1', 8, 16), ('4', 9, 8)]
        >>> anatomy.head, anatomy.embedding, anatomy.pooled
        ('7', 9, True)
    """
    seen = trace_forward(model, example)
    head = find_head(seen)
    chosen = find_stage_ends(seen)
    last = find_pooled_map(seen, head, chosen)
    if last is not None:
        chosen[-1:] = [last]
    embedder = head or find_first_head(seen)
    return NetworkStructure(
        stages=tuple(_make_stage(seen, call) for call in chosen),
        head=head.path if head else None,
        embedding=embedder.source.shape[1] if embedder is not None and embedder.source is not None else None,
        pooled=last is not None,
        embedder=embedder.path if embedder else None,
        image=seen.image,
    )


def find_stage_at(model: nn.Module, example: Tensor, path: str) -> Stage:
    """Return the stage that ends with the module ``path``, to override ``find_stages``.

    Args:
        model: images [B, 3, H, W] -> logits [B, K]; it stays as it was.
        example: images, on the model's device.
        path: as in ``named_modules()``, or as ``find_stages`` names it.  Of several calls the last counts.

    Raises:
        UsageError: no such module, or its output is no feature map.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
        >>> find_stage_at(net, torch.rand(2, 3, 16, 16), "0").height
        8
    """
    seen = trace_forward(model, example)
    names = {_call_label(seen, call) for call in seen.calls} | {name for name, _ in model.named_modules() if name}
    if path not in names:
        first = ", ".join(sorted(names)[:6])
        raise UsageError(
            f"{type(model).__name__} has no layer {path!r}{did_you_mean(path, names) or f'; it has {first}'}"
        )
    calls = [call for call in seen.calls if path in (_call_label(seen, call), None if call.behind else call.path)]
    if not calls:
        raise UsageError(f"{type(model).__name__} does not use its layer {path!r}; choose another")
    if calls[-1].grid is None:
        kind = "no tensor" if calls[-1].output is None else f"of shape {list(calls[-1].output.shape)}"
        raise UsageError(f"the output of {path!r} is {kind}, no feature map; choose a layer before the pooling")
    return _make_stage(seen, calls[-1])


def _make_stage(seen: ForwardTrace, call: ModuleCall) -> Stage:
    found: PreActivation = find_pre_activation(seen, call)
    grid = call.grid
    assert grid is not None
    return Stage(
        path=_call_label(seen, call),
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


def _call_label(seen: ForwardTrace, call: ModuleCall) -> str:
    path = f"{call.path}[{call.number}]" if seen.counts[call.path] > 1 else call.path
    return f"act({path})" if call.behind else path
