import torch
from torch import nn

from potstill.evaluation.cost import measure_memory
from potstill.input_spec import InputSpec


def test_what_is_alive_at_once_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    found = measure_memory(network, InputSpec(size=8))
    assert found["weights"] == 4 * (3 * 4 * 9 + 4 + 256 * 5 + 5)
    # Images, the convolution's output and the rectified one are alive while the ReLU computes; flattening is a view.
    assert found["activations"] == 4 * (3 * 64 + 4 * 64 + 4 * 64)
    assert measure_memory(network, InputSpec(size=8), batch=8)["activations"] == 8 * found["activations"]


def test_what_is_freed_counts_no_longer():
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)))
    assert measure_memory(deep, InputSpec(size=8))["activations"] == 4 * 3 * (3 * 64)  # the images, one in, one out


def test_buffers_count_and_nothing_is_changed():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    # 12 weights, then scale, shift, running mean and variance, and a counter of 8 bytes
    assert measure_memory(network, InputSpec(size=8))["weights"] == 4 * (12 + 4 * 4) + 8
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
