"""What is common to networks that are trained and deployed in the student's place."""

from typing import Any, ClassVar

from torch import nn

from potstill.errors import UsageError
from potstill.features.stages import Stage


class Remodelled(nn.Module):
    """A network around a student's.

    Attributes:
        facts: numbers and texts from which ``rebuild`` makes the same module around an untouched student.
    """

    name: ClassVar[str]
    network: nn.Module
    facts: dict[str, Any]


def refuse_inner(stage: Stage, method: str) -> None:
    """Layers can be put behind a map only where it leaves a submodule, once for each image.

    Raises:
        UsageError: the map is what a function makes of the submodule's output, or one of several outputs.
    """
    if stage.activated or stage.call is not None:
        why = "leaves a function, not a layer" if stage.activated else f"is one of several outputs of {stage.module!r}"
        raise UsageError(
            f"{method} puts layers behind the student's last map, and that one ({stage.path}) {why}; "
            "name another pair with layers, or use fitnet, which only reads it"
        )


def facts_of(given: dict[str, Any], name: str) -> dict[str, Any]:
    """What ``locals()`` holds at the start of an ``__init__``: its arguments, without the network."""
    left_out = ("self", "network", "__class__")
    return {"name": name, **{key: value for key, value in given.items() if key not in left_out}}
