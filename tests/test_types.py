import torch
from torchvision.transforms.v2 import functional as tv

from potstill.input_spec import InputSpec
from potstill.types import InputConverter

PIXELS = torch.rand(2, 3, 12, 12)


def prepared(spec: InputSpec) -> torch.Tensor:
    return tv.normalize(PIXELS, spec.mean, spec.std)


def test_normalisation_goes_from_one_networks_to_the_others():
    source = InputSpec(12, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    target = InputSpec(12, (0.4, 0.5, 0.6), (0.2, 0.3, 0.9))
    torch.testing.assert_close(InputConverter(source, target)(prepared(source)), prepared(target))


def test_equal_wishes_change_nothing():
    spec = InputSpec(12)
    images = prepared(spec)
    assert InputConverter(spec, spec)(images) is images


def test_size_follows_the_target():
    small, large = InputSpec(12), InputSpec(20)
    assert InputConverter(small, large)(prepared(small)).shape == (2, 3, 20, 20)


def test_leaves_no_trace_in_a_state_dict():
    assert InputConverter(InputSpec(12), InputSpec(20)).state_dict() == {}
