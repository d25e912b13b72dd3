import pytest
import timm
import torch
import torchvision

from potstill.distillation.output_router import format_pairs, middle_pair, pair_stages
from potstill.errors import UsageError
from potstill.features.stages import NetworkStructure, Stage, find_stages
from potstill.models.factory import create_model


def structure(image: int, *heights: int) -> NetworkStructure:
    found = tuple(Stage(f"s{i}", 8, height, height, "NCHW") for i, height in enumerate(heights))
    return NetworkStructure(found, "head", 8, True, image=(image, image))


def numbers(pairs) -> list[tuple[int, int]]:
    return [(int(ours.path[1:]), int(theirs.path[1:])) for ours, theirs in pairs]


PAIRS = [
    # student, teacher, pairs by position
    (structure(64, 16, 8, 4, 2), structure(64, 16, 8, 4, 2), [(0, 0), (1, 1), (2, 2), (3, 3)]),
    (
        structure(64, 32, 16, 8, 4, 2),
        structure(64, 16, 8, 4, 2),
        [(1, 0), (2, 1), (3, 2), (4, 3)],
    ),  # the 32 px one is left
    (structure(64, 16, 8, 4, 2), structure(64, 64, 32, 16, 8, 4), [(0, 2), (1, 3), (3, 4)]),
    (structure(32, 32, 16, 8), structure(32, 32, 16, 8, 4), [(0, 0), (1, 1), (2, 3)]),  # last with last
    (structure(32, 8, 4, 2), structure(224, 56, 28, 14, 7), [(0, 0), (1, 1), (2, 3)]),  # relative to the image
    (structure(64, 4, 4, 4, 4), structure(64, 4, 4), [(1, 0), (3, 1)]),  # by depth where resolution says nothing
    (structure(64, 4), structure(64, 16, 8, 4, 2), [(0, 3)]),
]


@pytest.mark.parametrize(("student", "teacher", "expected"), [PAIRS[i] for i in (0, 1, 3, 4, 5, 6)])
def test_pairs_by_resolution_then_depth(student, teacher, expected):
    assert numbers(pair_stages(student, teacher)) == expected
    assert numbers(pair_stages(teacher, student)) == [(theirs, ours) for ours, theirs in expected]


def test_every_stage_of_the_network_with_fewer_has_a_partner():
    """Four stages and five of higher resolution: the last two of the four cannot both have their own size."""
    student, teacher, _ = PAIRS[2]
    pairs = numbers(pair_stages(student, teacher))
    assert pairs == [(0, 1), (1, 2), (2, 3), (3, 4)]  # differences of 1 halving each; (0, 2), (1, 3) would leave none


def test_middle_and_last():
    four, five = structure(64, 16, 8, 4, 2), structure(64, 32, 16, 8, 4, 2)
    assert numbers([middle_pair(four, five), pair_stages(four, five)[-1]]) == [(1, 2), (3, 4)]
    three = structure(32, 32, 16, 8)
    assert numbers([middle_pair(three, three)]) == [(1, 1)]  # where the published FitNet numbers have their hint
    assert numbers([middle_pair(five, five)]) == [(2, 2)]


def test_a_network_without_stages():
    with pytest.raises(UsageError, match="no feature maps were found"):
        pair_stages(structure(64), structure(64, 16))


def test_a_transformer_beside_a_convolutional_network():
    images = torch.randn(2, 3, 64, 64)
    vit = find_stages(timm.create_model("vit_tiny_patch16_224", img_size=64), images)
    resnet = find_stages(torchvision.models.resnet18(), images)
    found = [(ours.path, theirs.path) for ours, theirs in pair_stages(resnet, vit)]
    assert found == [("layer1", "blocks.2"), ("layer2", "blocks.5"), ("layer3", "blocks.8"), ("layer4", "blocks.11")]


def test_the_table():
    images = torch.randn(2, 3, 64, 64)
    small = find_stages(create_model("cifar/resnet8", 10, size=64), images)
    large = find_stages(timm.create_model("vit_tiny_patch16_224", img_size=64), images)
    assert format_pairs(pair_stages(small, large)).splitlines() == [
        "student            teacher                     channels  size",
        "stage1 [16,64,64]  blocks.2 [192,4,4] tokens   x 12      x 0.0625",
        "stage2 [32,32,32]  blocks.8 [192,4,4] tokens   x 6       x 0.125",
        "stage3 [64,16,16]  blocks.11 [192,4,4] tokens  x 3       x 0.25",
    ]
