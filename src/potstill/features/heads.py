"""The layer that gives the logits, and what it reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.features.trace import Call, Trace, size_of


def find_head(seen: Trace) -> Call | None:
    """The linear layer whose output is the logits."""
    linear = _linear(seen)
    for call in linear:
        if call.output is seen.logits:
            return call
    for call in linear:  # a wrapper has changed the type, or only copied
        if _equal(call.output, seen.logits):
            return call
    return None


def first_of_heads(seen: Trace) -> Call | None:
    """DeiT with a distillation token gives the mean of two heads."""
    heads = [call for call in _linear(seen) if call.output is not None and call.output.shape == seen.logits.shape]
    if len(heads) < 2:
        return None
    mean = torch.stack([call.output for call in heads if call.output is not None]).mean(dim=0)
    return heads[-1] if _equal(mean, seen.logits) else None


def _linear(seen: Trace) -> list[Call]:
    """Linear layers that read one row for each image, the last first."""
    if not isinstance(seen.logits, Tensor) or seen.logits.ndim != 2:
        return []
    calls = [call for call in seen.calls if isinstance(call.module, nn.Linear) and not call.behind]
    return [call for call in reversed(calls) if call.source is not None and call.source.ndim == 2]


def _equal(output: Tensor | None, logits: Tensor) -> bool:
    if output is None or output.shape != logits.shape or not bool(logits.any()):
        return False
    return torch.allclose(output.to(logits), logits)


def pooled_by(seen: Trace, head: Call | None, chosen: Sequence[Call]) -> Call | None:
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
        if size_of(call) != size_of(chosen[-1]) or contains or call.mean.shape != wanted.shape or scale == 0:
            continue
        if torch.allclose(call.mean, wanted, rtol=0, atol=tolerance):
            return call
    return None
