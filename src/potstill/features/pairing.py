"""Pair stages of the student with stages of the teacher."""

import itertools
import math
from collections.abc import Sequence

from potstill.errors import UsageError
from potstill.features.stages import NetworkStructure, Stage

StagePair = tuple[Stage, Stage]  # the student's, the teacher's


def pair_stages(student: NetworkStructure, teacher: NetworkStructure) -> tuple[StagePair, ...]:
    """Pair every stage of the network with fewer stages with one of the other network, shallow to deep.

    The last belongs to the last.  Before it, partners are those whose resolutions differ least, in halvings relative to
    each network's image; where that leaves a choice, those at the most similar relative depth.

    Raises:
        UsageError: a network without stages.
    """
    fewer, more = sorted((student, teacher), key=lambda structure: len(structure.stages))
    if not fewer.stages:
        raise UsageError("no feature maps were found to be paired; name layers by their paths")
    count = len(fewer.stages) - 1
    chosen = min(
        itertools.combinations(range(len(more.stages) - 1), count),
        key=lambda positions: _mismatch(fewer, more, positions),
    )
    partners = [*(more.stages[position] for position in chosen), more.stages[-1]]
    ordered = zip(fewer.stages, partners, strict=True)
    return tuple(ordered) if fewer is student else tuple((ours, theirs) for theirs, ours in ordered)


def middle_pair(student: NetworkStructure, teacher: NetworkStructure) -> StagePair:
    """Return the middle pair (the shallower of two), as in FitNet's published results."""
    pairs = pair_stages(student, teacher)
    return pairs[(len(pairs) - 1) // 2]


def last_pair(student: NetworkStructure, teacher: NetworkStructure) -> StagePair:
    """Return the deepest pair."""
    return pair_stages(student, teacher)[-1]


def format_pairs(pairs: Sequence[StagePair]) -> str:
    """Describe the paths and shapes [C, H, W] of each pair, and the ratio of their sizes.

    Example:
        >>> small, large = Stage("stage2", 32, 8, 8, "NCHW"), Stage("blocks.5", 192, 4, 4, "tokens", 1)
        >>> print(format_pairs([(small, large)]))
        student          teacher                channels  size
        stage2 [32,8,8]  blocks.5 [192,4,4] tokens  x 6       x 0.5
    """
    rows = [("student", "teacher", "channels", "size")]
    rows += [
        (
            _format_stage(ours),
            _format_stage(theirs),
            f"x {theirs.channels / ours.channels:.3g}",
            _ratio(theirs.height / ours.height, theirs.width / ours.width),
        )
        for ours, theirs in pairs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _format_stage(stage: Stage) -> str:
    text = f"{stage.path} [{stage.channels},{stage.height},{stage.width}]"
    return text if stage.layout == "NCHW" else f"{text} {stage.layout}"


def _ratio(high: float, wide: float) -> str:
    return f"x {high:.3g}" if high == wide else f"x {high:.3g}, {wide:.3g}"


def _mismatch(fewer: NetworkStructure, more: NetworkStructure, positions: Sequence[int]) -> tuple[float, float]:
    resolution = depth = 0.0
    for place, position in enumerate(positions):
        resolution += abs(_halvings(fewer, place) - _halvings(more, position))
        depth += abs((place + 1) / len(fewer.stages) - (position + 1) / len(more.stages))
    return round(resolution, 3), depth


def _halvings(structure: NetworkStructure, position: int) -> float:
    """Return how often the image was halved to this size."""
    stage, (height, width) = structure.stages[position], structure.image
    if height and width:
        return math.log2(height * width / (stage.height * stage.width)) / 2
    return -math.log2(stage.height * stage.width) / 2
