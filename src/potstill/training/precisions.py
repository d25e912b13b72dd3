"""bf16 or float32 for each network of a run, where ``training.precision`` is auto."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from potstill.processes.group import ALONE, Processes
from potstill.training.calibration import ROUNDS, fastest, images_timed, training_step
from potstill.training.devices import Compute
from potstill.training.observer import Observer
from potstill.training.settings import TrainingSettings

SHARE = 0.02  # of a training's images: the most that timing may pass through the network
LEAST_ROUNDS, LEAST_IMAGES = 2, 16  # fewer say nothing


@dataclass(frozen=True)
class Precision:
    """The precision of a network's training, and what it was chosen by."""

    name: str  # "bf16" or "float32"
    seconds: dict[str, float] = field(default_factory=dict)  # median of a step by precision; empty: not timed


class Precisions:
    """Found at the first training of each network, kept by all that follow.

    Baseline and distilled are one network, so they have one precision; so have the students of further seeds.  A run
    that is resumed or reproduced takes what was recorded.

    Where timing would cost more than 2 % of the training, the network decides: float32 where it has depthwise
    convolutions, else bf16.

    Args:
        recorded: environment.json of an earlier process of this run, or of the run that is reproduced.
        keep: receives the facts for environment.json as soon as they are known.
        processes: all compute in the precision that the first one finds.
        clock: in seconds.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
        *,
        processes: Processes = ALONE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.processes, self.keep, self.clock = processes, keep, clock
        self.found = _recorded(recorded or {})

    def settle(
        self,
        network: nn.Module,
        name: str,
        size: int,
        settings: TrainingSettings,
        compute: Compute,
        *,
        images: int,
        observer: Observer | None = None,
    ) -> Compute:
        """The compute of a training that is about to begin, with its precision.

        Args:
            network: as it will be trained; a copy of it is timed.
            name: of its architecture.
            size: of its images, in pixels.
            settings: an explicit ``precision`` is taken as it is.
            compute: as ``choose`` gave it; where the hardware has no fast bf16, it is returned as it is.
            images: of an epoch.
            observer: is told what was found.
        """
        if settings.precision != "auto" or not compute.bf16:
            return compute
        key = f"{name} at {size} px"
        if key not in self.found:
            found = self._measured(network, size, settings, compute, images)
            self.found[key] = found = self.processes.share(found)
            if observer is not None and found.seconds:
                other = "float32" if found.name == "bf16" else "bf16"
                observer.note(
                    f"{key} trains in {found.name}: a step on a small batch takes {found.seconds[found.name]:.3g} s, "
                    f"{found.seconds[other]:.3g} s in {other}"
                )
            if self.keep is not None:
                self.keep(self.facts)
        return replace(compute, bf16=self.found[key].name == "bf16", fast_bf16=True)

    @property
    def facts(self) -> dict[str, Any]:
        """For environment.json; nothing before a precision has been found."""
        if not self.found:
            return {}
        each = {
            key: {
                "precision": found.name,
                "calibration": {name: round(seconds, 6) for name, seconds in sorted(found.seconds.items())},
            }
            for key, found in sorted(self.found.items())
        }
        return {"precision": ", ".join(sorted({found.name for found in self.found.values()})), "precisions": each}

    def _measured(
        self, network: nn.Module, size: int, settings: TrainingSettings, compute: Compute, images: int
    ) -> Precision:
        # Each round, and the one before that does not count, takes a step in either precision.
        allowed = SHARE * images * settings.epochs / 2
        batch = min(images_timed(settings.batch_size, size), int(allowed / (LEAST_ROUNDS + 1)))
        if batch < min(LEAST_IMAGES, images_timed(settings.batch_size, size)):
            return Precision("float32" if has_depthwise(network) else "bf16")
        current = {"name": "bf16"}

        def choose(name: str) -> None:
            current["name"] = name

        step = training_step(
            network, size, batch, compute, autocast=lambda: replace(compute, bf16=current["name"] == "bf16").autocast()
        )
        rounds = min(ROUNDS, int(allowed / batch) - 1)
        return Precision(*fastest(step, ["bf16", "float32"], choose=choose, clock=self.clock, most=rounds))


def has_depthwise(network: nn.Module) -> bool:
    """Whether any convolution treats each channel by itself.

    Example:
        >>> has_depthwise(nn.Conv2d(8, 8, 3, groups=8)), has_depthwise(nn.Conv2d(8, 8, 3))
        (True, False)
    """
    return any(
        isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
        for module in network.modules()
    )


def _recorded(facts: Mapping[str, Any]) -> dict[str, Precision]:
    """What ``Precisions.facts`` gave; what is of another form is left out."""
    found: dict[str, Precision] = {}
    precisions = facts.get("precisions")
    for key, value in precisions.items() if isinstance(precisions, Mapping) else ():
        if isinstance(value, Mapping) and value.get("precision") in ("bf16", "float32"):
            timed = value.get("calibration")
            seconds = {str(name): float(each) for name, each in timed.items()} if isinstance(timed, Mapping) else {}
            found[str(key)] = Precision(str(value["precision"]), seconds)
    return found
