"""RandAugment and TrivialAugment against torchvision's own, told what to draw."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from potstill.data.augment import POLICIES, STRONG_POLICY, AugmentPolicy
from potstill.data.samplers import CounterRNG, uniform

COUNT, SIDE = 300, 20
PEERS = {"randaugment": v2.RandAugment, "strong": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}


def images(count=COUNT, side=SIDE):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def slow(policy: AugmentPolicy, given: torch.Tensor, seed: int, view: int) -> torch.Tensor:
    """One image after the other, by torchvision's tables and functions."""
    peer = PEERS[policy.field]()
    space, found = list(peer._AUGMENTATION_SPACE.items()), []
    for i, image in enumerate(given):

        def draw(what: str, i: int = i) -> float:
            return float(uniform(seed, f"{policy.field} {what}", np.array([i]), view)[0])

        for number in range(policy.count):
            name, (magnitudes, signed) = space[int(draw(f"operation {number}") * 14)]
            levels = magnitudes(31, SIDE, SIDE)
            place = int(draw(f"magnitude {number}") * 31) if policy.magnitude is None else policy.magnitude
            magnitude = 0.0 if levels is None else float(levels[place])
            if signed and draw(f"sign {number}") < 0.5:
                magnitude = -magnitude
            image = peer._apply_image_or_video_transform(image, name, magnitude, InterpolationMode.NEAREST, {})
        found.append(image)
    return torch.stack(found)


@pytest.mark.parametrize("policy", [*POLICIES.values(), STRONG_POLICY], ids=lambda policy: policy.field)
def test_policies_are_torchvisions(monkeypatch: pytest.MonkeyPatch, policy: AugmentPolicy) -> None:
    monkeypatch.setattr("torchvision.transforms.v2._auto_augment._get_fill", lambda fill, kind: None)
    given = images()
    found = policy(given, CounterRNG(5, np.arange(COUNT), 2))
    assert torch.equal(found, slow(policy, given, 5, 2))
    assert torch.equal(given, images())
    assert (found == given).all(dim=(1, 2, 3)).float().mean() < 0.4


def test_they_have_as_many_operations_and_the_magnitudes_that_torchvision_has() -> None:
    randaugment = v2.RandAugment()
    ours = POLICIES["randaugment"]
    assert (ours.count, ours.magnitude) == (randaugment.num_ops, randaugment.magnitude)
    assert randaugment.num_magnitude_bins == v2.TrivialAugmentWide().num_magnitude_bins == 31
    assert (STRONG_POLICY.count, STRONG_POLICY.magnitude) == (2, 10)
    assert (POLICIES["trivialaugment"].count, POLICIES["trivialaugment"].magnitude) == (1, None)


@pytest.mark.parametrize("policy", [*POLICIES.values(), STRONG_POLICY], ids=lambda policy: policy.field)
def test_images_do_not_depend_on_their_batch(policy: AugmentPolicy) -> None:
    given, ids = images(60), np.arange(60)
    together = policy(given, CounterRNG(0, ids, 1))
    alone = torch.cat([policy(given[i : i + 1], CounterRNG(0, ids[i : i + 1], 1)) for i in range(60)])
    assert torch.equal(together, alone)
