"""Which calls of a forward pass end its stages."""

from collections import Counter

from torch import nn

from potstill.features.trace import CONTAINERS, Call, Trace, grid_of, size_of, weight_layers

# A map of one pixel is a stage where a network with small images simply goes on halving.  More at once than this is
# the network's way to flatten (timm's VGG reads its 7 x 7 map by one convolution).
_LAST_STEP = 16
_ISOTROPIC_STAGES = 4  # into which blocks of equal resolution are divided, as the four of common pyramids


def stage_ends(seen: Trace) -> list[Call]:
    """The calls that end the stages, shallow to deep."""
    blocks = _blocks(seen)
    body = _body(seen, blocks)
    sizes = list(dict.fromkeys(size_of(call) for call in body))
    sizes.sort(key=lambda size: -size[0] * size[1])
    chosen: list[Call] = []
    for size in sizes:
        here = [call for call in body if size_of(call) == size]
        here = [call for call in here if not any(call in stage.around for stage in chosen)]
        if size == (1, 1) and len(sizes) > 1 and here and not _goes_on(here[0]):
            continue
        while len(here) > 1 and _is_layer_norm(here[-1].module):
            here.pop()
        if here:
            fewest = min(_steps_around(call) for call in here)
            chosen.append([call for call in here if _steps_around(call) == fewest][-1])
    return _divided(chosen[0], seen, blocks) if len(chosen) == 1 else chosen


def _body(seen: Trace, blocks: list[Call]) -> list[Call]:
    """Calls that could end a stage: they put out maps, are no detour, belong to no stem and do not end in pooling."""
    begin = _begin(seen, blocks)
    calls = [call for call in seen.calls if call.grid is not None and call.productive and not _detour(call)]
    inside_ends: dict[Call, Call] = {}  # by call: the last one inside it
    for call in calls:
        for outer in call.around:
            inside_ends[outer] = call

    def pools(call: Call) -> bool:
        return call in inside_ends and not call.behind and grid_of(inside_ends[call]).area > grid_of(call).area

    def within_block(call: Call) -> bool:  # one that itself halves the map, other than by pooling at its end
        area = grid_of(call).area
        return any(outer in halving and grid_of(outer).area < area for outer in call.around)

    halving = {block for block in blocks if not pools(block)}
    body: list[Call] = []
    largest = 0
    for call in reversed(calls):
        area = grid_of(call).area
        largest = max(largest, area)
        if call.end > begin and area == largest and not pools(call) and not within_block(call):
            body.append(call)
    return body[::-1]


def _detour(call: Call) -> bool:
    """Whether the map is smaller than what comes of it (squeeze and excitation), or larger than all around it."""
    area = grid_of(call).area
    for outer in call.around:
        if outer.grid is not None:
            bound = max(outer.grid.area, outer.grid_in.area) if outer.grid_in is not None else area
            if not outer.grid.area <= area <= bound:
                return True
    return False


def _steps_around(call: Call) -> int:
    """The number of modules around it that go on to a smaller map."""
    return sum(outer.grid is not None and outer.grid.area < grid_of(call).area for outer in call.around)


def _goes_on(first: Call) -> bool:
    """Whether the first map of one pixel is made as all before it, rather than by pooling."""
    return first.grid_in is not None and 1 < first.grid_in.area <= _LAST_STEP


def _blocks(seen: Trace) -> list[Call]:
    """Calls of the units of which networks are built.

    They have several layers each, and there are several of one class, or they stand in a row with such.
    """
    units = [
        call
        for call in seen.calls
        if call.grid is not None
        and not isinstance(call.module, CONTAINERS)
        and not call.behind
        and weight_layers(call.module) >= 2
        and not _detour(call)
    ]
    kinds = Counter(kind for kind, _ in {(type(call.module), call.path) for call in units})
    rows = {_row(seen, call) for call in units if kinds[type(call.module)] >= 2} - {None}
    blocks = [call for call in units if kinds[type(call.module)] >= 2 or _row(seen, call) in rows]
    return sorted(blocks, key=lambda call: call.start)


def _row(seen: Trace, call: Call) -> tuple[str, int] | None:
    """The outermost of the containers directly around it, and how deep it lies in there."""
    path, depth = call.path, 0
    while (outer := _parent(path)) in seen.containers:
        path, depth = outer, depth + 1
    return (path, depth) if depth else None


def _begin(seen: Trace, blocks: list[Call]) -> int:
    """When the stem is over: with the first block, or group of other layers that stands in a row with groups of blocks.

    Where blocks stand in rows, one that stands alone (in the stem, or between stages) does not count.
    """
    rows = {row for block in blocks if (row := _row(seen, block)) is not None}
    starts = [block.start for block in blocks if not rows or _row(seen, block) in rows]
    outermost = {path for path, depth in rows if depth > 1}
    starts += [call.start for call in seen.calls if call.path in seen.containers and _parent(call.path) in outermost]
    return min(starts, default=0)


def _divided(only: Call, seen: Trace, blocks: list[Call]) -> list[Call]:
    """The ends of four groups of blocks, where a network keeps its resolution."""
    outer = [call for call in blocks if not any(other in call.around for other in blocks)]
    if not outer:  # blocks without a class of their own
        outer = [call for call in seen.calls if _parent(call.path) == only.path and weight_layers(call.module) >= 2]
    here = [call for call in outer if call.grid is not None and size_of(call) == size_of(only)]
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
