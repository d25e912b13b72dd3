import json

import pytest
import torch
from torch import nn

from potstill.training.autotune import MAX_TIMING_SHARE, MIN_SPEEDUP, PrecisionSelector
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings

FAST = Compute(torch.device("cpu"), bf16=True, channels_last=False)
SLOW = Compute(torch.device("cpu"), bf16=False, channels_last=False)
AUTO = TrainingSettings(epochs=10, batch_size=32)


class Clock:
    """Time passes by the network's forward passes alone: so long in each precision."""

    def __init__(self, bf16: float, float32: float) -> None:
        self.seconds, self.now, self.images = {torch.bfloat16: bf16, torch.float32: float32}, 0.0, 0

    def __call__(self) -> float:
        return self.now


class Net(nn.Module):
    """Tells a clock which precision it computes in."""

    def __init__(self, clock: Clock, *, depthwise: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, groups=3 if depthwise else 1)
        self.tick = lambda dtype, images: self._tick(clock, dtype, images)

    @staticmethod
    def _tick(clock: Clock, dtype: torch.dtype, images: int) -> None:
        clock.now += clock.seconds[dtype]
        clock.images += images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.conv(images)
        self.tick(found.dtype, len(images))
        return found.flatten(1)


def settle(
    precisions: PrecisionSelector,
    network: nn.Module,
    name: str = "net",
    settings: TrainingSettings = AUTO,
    compute: Compute = FAST,
    images: int = 10_000,
    observer: SilentObserver | None = None,
) -> str:
    return precisions.select(network, name, 16, settings, compute, images=images, observer=observer).precision


@pytest.mark.parametrize(
    ("bf16", "float32", "kept"),
    [(0.010, 0.020, "bf16"), (0.010, 0.010, "bf16"), (0.0108, 0.0100, "bf16"), (0.015, 0.010, "float32")],
)
def test_bf16_unless_float32_is_clearly_faster(bf16: float, float32: float, kept: str) -> None:
    clock, kept_facts = Clock(bf16, float32), []
    precisions = PrecisionSelector(on_choice=kept_facts.append, clock=clock)
    assert settle(precisions, Net(clock)) == kept
    assert MIN_SPEEDUP == 1.1
    (facts,) = kept_facts
    assert facts["precision"] == kept
    assert facts["precisions"]["net at 16 px"]["precision"] == kept
    assert facts["precisions"]["net at 16 px"]["calibration"] == pytest.approx({"bf16": bf16, "float32": float32})


def test_baseline_and_distilled_are_one_network_and_another_is_timed_on_its_own() -> None:
    clock = Clock(0.015, 0.010)
    precisions = PrecisionSelector(clock=clock)
    assert settle(precisions, Net(clock)) == "float32"
    clock.seconds[torch.bfloat16] = 0.001  # by now a neighbour is busy, or no longer
    assert settle(precisions, Net(clock)) == "float32"
    assert settle(precisions, Net(clock), "teacher") == "bf16"


def test_a_resumed_or_reproduced_run_takes_what_was_recorded() -> None:
    clock = Clock(0.015, 0.010)
    first = PrecisionSelector(clock=clock)
    settle(first, Net(clock))
    recorded = json.loads(json.dumps({"threads": 1, **first.facts}))
    clock.seconds[torch.bfloat16], passed = 0.001, clock.images
    second = PrecisionSelector(recorded, clock=clock)
    assert settle(second, Net(clock)) == "float32"
    assert clock.images == passed  # not timed again
    assert second.facts == first.facts


def test_what_is_given_or_cannot_be_otherwise_is_not_timed() -> None:
    clock = Clock(0.015, 0.010)
    precisions = PrecisionSelector(clock=clock)
    assert settle(precisions, Net(clock), settings=TrainingSettings(precision="bf16")) == "bf16"
    assert settle(precisions, Net(clock), compute=SLOW) == "float32"
    assert (clock.images, precisions.facts) == (0, {})


@pytest.mark.parametrize("images", [1, 100, 239, 240, 1_000, 5_000, 100_000])
@pytest.mark.parametrize("depthwise", [False, True])
def test_timing_passes_at_most_a_fiftieth_of_the_trainings_images(images: int, depthwise: bool) -> None:
    """Ten epochs; where 16 images in three steps of either precision are more than that, the network's kind decides."""
    clock, notes = Clock(0.010, 0.010), []

    class Listening(SilentObserver):
        def note(self, message: str) -> None:
            notes.append(message)

    found = settle(PrecisionSelector(clock=clock), Net(clock, depthwise=depthwise), images=images, observer=Listening())
    assert MAX_TIMING_SHARE == 0.02
    assert clock.images <= images * 10 // 50
    timed = images * 10 // 50 >= 3 * 2 * 16
    assert (clock.images > 0) == timed == bool(notes)
    assert found == ("float32" if depthwise and not timed else "bf16")


def test_teachers_keep_their_own_precision() -> None:
    clock = Clock(0.015, 0.010)
    compute = PrecisionSelector(clock=clock).select(Net(clock), "net", 16, AUTO, FAST, images=10_000)
    assert not compute.bf16
    assert compute.teacher_in_bf16
    assert not SLOW.teacher_in_bf16
