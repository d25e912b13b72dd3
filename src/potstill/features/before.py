"""What comes before a map's last activation."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from potstill.features.trace import Activated, Call, Trace


@dataclass(frozen=True)
class Before:
    """Where the map before activation is read; see ``Stage``."""

    kind: Literal["map", "activation", "function", "output", "norm"]
    activation: str | None
    norm: str | None
    overwritten: bool


def before(seen: Trace, call: Call) -> Before:
    """How to read the map before the activation that ended this call.

    In networks that activate at the start of a block, the map is a bare sum, and the next block's BatchNorm gives its
    form before activation; so the published numbers of OFD and AB on wide residual networks are made.
    """
    activated = call.activated
    if activated is not None:
        norm = _norm(seen, call, activated)
        if activated.path is not None:
            return Before("activation", activated.path, norm, activated.overwritten)
        return Before("output" if call.behind else "function", None, norm, activated.overwritten)
    if (follower := _follower(seen, call)) is not None:
        return follower
    return Before("map", None, _norm(seen, call, None), call.overwritten)


def _follower(seen: Trace, call: Call) -> Before | None:
    """BatchNorm and activation applied to the map, as the next block begins."""
    for norm in _norms(seen):
        if norm.source is call.output and norm.start > call.end and _fits(norm, call):
            for activated in seen.activated:
                inside = bool(activated.around) and activated.around[-1] is norm  # timm's BatchNorm activates too
                if inside and activated.path is not None:
                    return Before("activation", activated.path, norm.path, activated.overwritten)
                if activated.before is norm.output:
                    return Before("norm", None, norm.path, norm.overwritten)
    return None


def _norm(seen: Trace, call: Call, activated: Activated | None) -> str | None:
    """The BatchNorm whose output, perhaps with a shortcut added, is activated."""
    if activated is not None and activated.around and activated.around[-1] in _norms(seen):
        found: Call | None = activated.around[-1]
    else:
        found = _source_norm(seen, call.output if activated is None else activated.before)
        found = found or _last_norm(seen, call, activated)
    return found.path if found is not None and _fits(found, call) else None


def _source_norm(seen: Trace, tensor: Tensor | None) -> Call | None:
    return next((norm for norm in reversed(_norms(seen)) if norm.output is tensor), None)


def _last_norm(seen: Trace, call: Call, activated: Activated | None) -> Call | None:
    """The last BatchNorm of the block's own path, unless a convolution follows it there.

    A shortcut has a BatchNorm of its own, which may be called later: it lies deeper, or reads the block's input.
    """
    block = call
    if activated is not None and activated.around:
        block = activated.around[-1]
    elif activated is None:
        block = next(one for one in seen.calls if one.output is call.output and not one.behind)
    norms = [norm for norm in _norms(seen) if block in norm.around]
    if not norms:
        return None
    convolutions = [one for one in seen.calls if isinstance(one.module, nn.Conv2d) and block in one.around]
    made_of = {id(one.output): one for one in convolutions}

    def is_shortcut(norm: Call) -> bool:
        convolution = made_of.get(id(norm.source))
        return convolution is not None and convolution.source is block.source

    found = min(norms, key=lambda norm: (is_shortcut(norm), len(norm.around), -norm.end))
    later = [one for one in convolutions if one.start > found.end and len(one.around) <= len(found.around)]
    return None if any(one.source is not block.source for one in later) else found


def _norms(seen: Trace) -> list[Call]:
    return [one for one in seen.calls if isinstance(one.module, nn.BatchNorm2d) and not one.behind]


def _fits(norm: Call, call: Call) -> bool:
    assert call.grid is not None
    return getattr(norm.module, "num_features", None) == call.grid.channels
