"""Networks that are trained and deployed in the student's place: the student with other last layers.

Each is built from a student and plain facts, so that a saved model can be built again without teacher and method.
"""

from typing import Any

from torch import nn

from potstill.errors import UsageError, nearest
from potstill.features.expanded_stage import ExpandedStage, MergedStage
from potstill.features.projected_head import ProjectedHead
from potstill.features.remodelled import Remodelled

REMODELS: dict[str, type[Remodelled]] = {
    "projected_head": ProjectedHead,
    "expanded_stage": ExpandedStage,
    "merged_stage": MergedStage,
}


def rebuild(network: nn.Module, facts: dict[str, Any]) -> Remodelled:
    """The module that ``facts`` describe, around an untouched student's network, ready for its saved weights.

    Args:
        network: the student as it is created; changed in place.
        facts: the ``facts`` of a remodelled network.

    Raises:
        UsageError: facts of an unknown module, or that do not fit it.

    Example:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> rebuild(student, {"name": "merged_stage", "stage": "0", "channels": 4}).facts["layout"]
        'NCHW'
    """
    given = dict(facts)
    name = given.pop("name", None)
    if name not in REMODELS:
        raise UsageError(
            f"no remodelled network {name!r}{nearest(str(name), REMODELS) or '.'} Known: {', '.join(REMODELS)}"
        )
    try:
        return REMODELS[name](network, **given)
    except TypeError as error:
        raise UsageError(f"these facts do not describe a {name}: {error}") from None
