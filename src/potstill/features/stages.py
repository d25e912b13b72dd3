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

# A map of one pixel is a stage if the network reaches it by halving.  A larger reduction at once is
# flattening (timm's VGG reads its 7 x 7 map by one convolution).
_LAST_STEP = 16
_ISOTROPIC_STAGES = 4  # for blocks of equal resolution, as in common pyramids


def find_stage_ends(trace: ForwardTrace) -> list[ModuleCall]:
    """Return the calls that end the stages, shallow to deep."""
    blocks = _blocks(trace)
    found = _stage_candidates(trace, blocks)
    sizes = list(dict.fromkeys(map_size(call) for call in found))
    sizes.sort(key=lambda size: -size[0] * size[1])
    chosen: list[ModuleCall] = []
    for size in sizes:
        candidates = [call for call in found if map_size(call) == size]
        candidates = [call for call in candidates if not any(call in stage.parents for stage in chosen)]
        if size == (1, 1) and len(sizes) > 1 and candidates and not _continues_halving(candidates[0]):
            continue
        while len(candidates) > 1 and any(
            name in type(candidates[-1].module).__name__ for name in ("LayerNorm", "RMSNorm", "RmsNorm")
        ):
            candidates.pop()
        if candidates:
            fewest = min(_count_larger_parents(call) for call in candidates)
            chosen.append([call for call in candidates if _count_larger_parents(call) == fewest][-1])
    return _divide_blocks(chosen[0], trace, blocks) if len(chosen) == 1 else chosen


def _stage_candidates(trace: ForwardTrace, blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return calls that may end a stage: they output maps on the main path after the stem, and do not pool."""
    stem_end = _stem_end(trace, blocks)
    calls = [
        call for call in trace.calls if call.grid is not None and call.computes_features and not _is_side_branch(call)
    ]
    inside_ends: dict[ModuleCall, ModuleCall] = {}  # by call: the last one inside it
    for call in calls:
        for outer in call.parents:
            inside_ends[outer] = call

    def pools(call: ModuleCall) -> bool:
        return call in inside_ends and not call.is_function and map_grid(inside_ends[call]).area > map_grid(call).area

    def within_block(call: ModuleCall) -> bool:  # one that itself halves the map, other than by pooling at its end
        area = map_grid(call).area
        return any(outer in halving and map_grid(outer).area < area for outer in call.parents)

    halving = {block for block in blocks if not pools(block)}
    found: list[ModuleCall] = []
    largest = 0
    for call in reversed(calls):
        area = map_grid(call).area
        largest = max(largest, area)
        if call.end > stem_end and area == largest and not pools(call) and not within_block(call):
            found.append(call)
    return found[::-1]


def _is_side_branch(call: ModuleCall) -> bool:
    """Return whether a map is smaller than the output of a parent (squeeze and excitation), or larger than them all."""
    area = map_grid(call).area
    for outer in call.parents:
        if outer.grid is not None:
            bound = max(outer.grid.area, outer.grid_in.area) if outer.grid_in is not None else area
            if not outer.grid.area <= area <= bound:
                return True
    return False


def _count_larger_parents(call: ModuleCall) -> int:
    """Return the number of parent calls whose output map is smaller."""
    return sum(outer.grid is not None and outer.grid.area < map_grid(call).area for outer in call.parents)


def _continues_halving(first: ModuleCall) -> bool:
    """Return whether the first map of one pixel comes from halving, like those before it, and not from pooling."""
    return first.grid_in is not None and 1 < first.grid_in.area <= _LAST_STEP


def _blocks(trace: ForwardTrace) -> list[ModuleCall]:
    units = [
        call
        for call in trace.calls
        if call.grid is not None
        and not isinstance(call.module, CONTAINERS)
        and not call.is_function
        and count_weight_layers(call.module) >= 2
        and not _is_side_branch(call)
    ]
    kinds = Counter(kind for kind, _ in {(type(call.module), call.path) for call in units})
    rows = {_container_of(trace, call) for call in units if kinds[type(call.module)] >= 2} - {None}
    blocks = [call for call in units if kinds[type(call.module)] >= 2 or _container_of(trace, call) in rows]
    return sorted(blocks, key=lambda call: call.start)


def _container_of(trace: ForwardTrace, call: ModuleCall) -> tuple[str, int] | None:
    path, depth = call.path, 0
    while (outer := _parent(path)) in trace.containers:
        path, depth = outer, depth + 1
    return (path, depth) if depth else None


def _stem_end(trace: ForwardTrace, blocks: list[ModuleCall]) -> int:
    """Return when the stem ends: at the first block that is not alone beside containers, or group of layers."""
    rows = {row for block in blocks if (row := _container_of(trace, block)) is not None}
    starts = [block.start for block in blocks if not rows or _container_of(trace, block) in rows]
    outermost = {path for path, depth in rows if depth > 1}
    starts += [call.start for call in trace.calls if call.path in trace.containers and _parent(call.path) in outermost]
    return min(starts, default=0)


def _divide_blocks(single: ModuleCall, trace: ForwardTrace, blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return the ends of four groups of blocks, for a network of constant resolution."""
    outer = [call for call in blocks if not any(other in call.parents for other in blocks)]
    if not outer:  # blocks without their own class
        outer = [
            call for call in trace.calls if _parent(call.path) == single.path and count_weight_layers(call.module) >= 2
        ]
    candidates = [call for call in outer if call.grid is not None and map_size(call) == map_size(single)]
    # Class attention blocks are in another container.
    rows = Counter(_container_of(trace, call) for call in candidates)
    candidates = [call for call in candidates if _container_of(trace, call) == rows.most_common(1)[0][0]]
    if len(candidates) < 2:
        return [single]
    groups = min(_ISOTROPIC_STAGES, len(candidates))
    return [candidates[-(-len(candidates) * (group + 1) // groups) - 1] for group in range(groups)]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def find_head(trace: ForwardTrace) -> ModuleCall | None:
    """Return the linear layer whose output is the logits."""
    linear = _linear_calls(trace)
    for call in linear:
        if call.output is trace.logits:
            return call
    for call in linear:  # a wrapper changed the type, or made a copy
        if _same_logits(call.output, trace.logits):
            return call
    return None


def find_first_head(trace: ForwardTrace) -> ModuleCall | None:
    """Return the last of several heads whose mean is the output, as in DeiT with a distillation token."""
    heads = [
        call for call in _linear_calls(trace) if call.output is not None and call.output.shape == trace.logits.shape
    ]
    if len(heads) < 2:
        return None
    mean = torch.stack([call.output for call in heads if call.output is not None]).mean(dim=0)
    return heads[-1] if _same_logits(mean, trace.logits) else None


def _linear_calls(trace: ForwardTrace) -> list[ModuleCall]:
    """Return the linear layers with one input row per image, last first."""
    if not isinstance(trace.logits, Tensor) or trace.logits.ndim != 2:
        return []
    calls = [call for call in trace.calls if isinstance(call.module, nn.Linear) and not call.is_function]
    return [call for call in reversed(calls) if call.source is not None and call.source.ndim == 2]


def _same_logits(output: Tensor | None, logits: Tensor) -> bool:
    if output is None or output.shape != logits.shape or not bool(logits.any()):
        return False
    return torch.allclose(output.to(logits), logits)


def find_pooled_map(trace: ForwardTrace, head: ModuleCall | None, chosen: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the call whose map's mean is the input of the head, in or after the last stage and at its resolution."""
    if head is None or head.source is None or not chosen:
        return None
    embedding = head.source.float()
    scale = float(embedding.abs().max())
    tolerance = scale * max(1e-4, 8 * torch.finfo(head.source.dtype).eps)
    for call in reversed(trace.calls):
        if call.mean is None or call.grid is None or not call.computes_features or call.end < chosen[-1].end:
            continue
        contains = any(call in stage.parents for stage in chosen[:-1])
        if map_size(call) != map_size(chosen[-1]) or contains or call.mean.shape != embedding.shape or scale == 0:
            continue
        if torch.allclose(call.mean, embedding, rtol=0, atol=tolerance):
            return call
    return None


@dataclass(frozen=True)
class PreActivation:
    """Where to read the map before activation; see ``Stage``."""

    kind: Literal["map", "activation", "function", "output", "norm"]
    activation: str | None
    norm: str | None
    overwritten: bool


def find_pre_activation(trace: ForwardTrace, call: ModuleCall) -> PreActivation:
    """Return how to read the map before the activation that ended this call.

    In networks that activate at the start of a block, it is what the next block's BatchNorm makes of the sum, as in the
    published numbers of OFD and AB on wide residual networks.
    """
    activated = call.activated
    if activated is not None:
        norm = _find_norm(trace, call, activated)
        if activated.path is not None:
            return PreActivation("activation", activated.path, norm, activated.overwritten)
        return PreActivation("output" if call.is_function else "function", None, norm, activated.overwritten)
    if (follower := _next_block_norm(trace, call)) is not None:
        return follower
    return PreActivation("map", None, _find_norm(trace, call, None), call.overwritten)


def _next_block_norm(trace: ForwardTrace, call: ModuleCall) -> PreActivation | None:
    """Return BatchNorm and activation that the next block applies to the map first."""
    for norm in _norm_calls(trace):
        if norm.source is call.output and norm.start > call.end and _has_channels_of(norm, call):
            for activated in trace.activated:
                inside = bool(activated.parents) and activated.parents[-1] is norm  # timm's BatchNorm activates too
                if inside and activated.path is not None:
                    return PreActivation("activation", activated.path, norm.path, activated.overwritten)
                if activated.before is norm.output:
                    return PreActivation("norm", None, norm.path, norm.overwritten)
    return None


def _find_norm(trace: ForwardTrace, call: ModuleCall, activated: ActivationCall | None) -> str | None:
    if activated is not None and activated.parents and activated.parents[-1] in _norm_calls(trace):
        found: ModuleCall | None = activated.parents[-1]
    else:
        source = call.output if activated is None else activated.before
        found = next((norm for norm in reversed(_norm_calls(trace)) if norm.output is source), None)
        found = found or _last_norm(trace, call, activated)
    return found.path if found is not None and _has_channels_of(found, call) else None


def _last_norm(trace: ForwardTrace, call: ModuleCall, activated: ActivationCall | None) -> ModuleCall | None:
    """Return the last BatchNorm of a block's main path, not its shortcut, unless a convolution follows."""
    block = call
    if activated is not None and activated.parents:
        block = activated.parents[-1]
    elif activated is None:
        block = next(other for other in trace.calls if other.output is call.output and not other.is_function)
    norms = [norm for norm in _norm_calls(trace) if block in norm.parents]
    if not norms:
        return None
    convolutions = [other for other in trace.calls if isinstance(other.module, nn.Conv2d) and block in other.parents]
    made_of = {id(other.output): other for other in convolutions}

    def is_shortcut(norm: ModuleCall) -> bool:
        convolution = made_of.get(id(norm.source))
        return convolution is not None and convolution.source is block.source

    found = min(norms, key=lambda norm: (is_shortcut(norm), len(norm.parents), -norm.end))
    later = [other for other in convolutions if other.start > found.end and len(other.parents) <= len(found.parents)]
    return None if any(other.source is not block.source for other in later) else found


def _norm_calls(trace: ForwardTrace) -> list[ModuleCall]:
    return [other for other in trace.calls if isinstance(other.module, nn.BatchNorm2d) and not other.is_function]


def _has_channels_of(norm: ModuleCall, call: ModuleCall) -> bool:
    assert call.grid is not None
    return getattr(norm.module, "num_features", None) == call.grid.channels


@dataclass(frozen=True)
class Stage:
    """A feature map and where to read it.

    The map before the last activation is, as ``find_pre_activation`` defines it: the map itself ("map", there is no
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
    inactive: bool = False  # whether the embedding is 0 for all example images, so that ``pooled`` cannot be found
    image: tuple[int, int] = (0, 0)  # height and width of the images


def find_stages(model: nn.Module, example: Tensor) -> NetworkStructure:
    """Return the structure of a classifier, from one forward pass in eval mode over the first two images.

    A stage ends with the last module whose output has its resolution, seen from outside: of a whole residual stage, not
    of its convolutions; of a plain network, the last activation before the pooling.  The stem, all before the first
    repeated block, is left out.  Networks that keep one resolution, as most
    transformers, are divided into four groups of blocks.  Where the head reads the mean of a map, that map is the last
    one, so a convolution, normalisation or activation behind the last block counts as part of it; a last LayerNorm does
    not count otherwise.

    ``model`` maps images [B, 3, H, W] to logits [B, K]; it stays as it was.

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
    trace = trace_forward(model, example)
    head = find_head(trace)
    chosen = find_stage_ends(trace)
    last = find_pooled_map(trace, head, chosen)
    if last is not None:
        chosen[-1:] = [last]
    embedder = head or find_first_head(trace)
    embedding = None if embedder is None else embedder.source
    return NetworkStructure(
        stages=tuple(_make_stage(trace, call) for call in chosen),
        head=head.path if head else None,
        embedding=None if embedding is None else embedding.shape[1],
        pooled=last is not None,
        embedder=embedder.path if embedder else None,
        inactive=embedding is not None and not bool(embedding.any()),
        image=trace.image,
    )


def find_stage_at(model: nn.Module, example: Tensor, path: str) -> Stage:
    """Return the stage that ends with the module ``path``, to override ``find_stages``.

    ``path`` is as in ``named_modules()``, or as ``find_stages`` names it.  Of several calls the last counts.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
        >>> find_stage_at(net, torch.rand(2, 3, 16, 16), "0").height
        8
    """
    trace = trace_forward(model, example)
    names = {_call_label(trace, call) for call in trace.calls} | {name for name, _ in model.named_modules() if name}
    if path not in names:
        first = ", ".join(sorted(names)[:6])
        raise UsageError(
            f"{type(model).__name__} has no layer {path!r}{did_you_mean(path, names) or f'; it has {first}'}"
        )
    calls = [
        call for call in trace.calls if path in (_call_label(trace, call), None if call.is_function else call.path)
    ]
    if not calls:
        raise UsageError(f"{type(model).__name__} does not use its layer {path!r}; choose another")
    if calls[-1].grid is None:
        kind = "no tensor" if calls[-1].output is None else f"of shape {list(calls[-1].output.shape)}"
        raise UsageError(f"the output of {path!r} is {kind}, no feature map; choose a layer before the pooling")
    return _make_stage(trace, calls[-1])


def _make_stage(trace: ForwardTrace, call: ModuleCall) -> Stage:
    found: PreActivation = find_pre_activation(trace, call)
    grid = call.grid
    assert grid is not None
    return Stage(
        path=_call_label(trace, call),
        channels=grid.channels,
        height=grid.height,
        width=grid.width,
        layout=grid.layout,
        prefix=grid.prefix,
        activation=found.activation,
        norm=found.norm,
        module=call.path,
        call=call.number if trace.counts[call.path] > 1 else None,
        activated=call.is_function,
        before=found.kind,
        copied=call.overwritten,
        copied_before=found.overwritten,
    )


def _call_label(trace: ForwardTrace, call: ModuleCall) -> str:
    path = f"{call.path}[{call.number}]" if trace.counts[call.path] > 1 else call.path
    return f"act({path})" if call.is_function else path
