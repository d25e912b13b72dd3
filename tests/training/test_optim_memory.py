import copy

import pytest
import torch
from torch import nn

from potstill.training import checkpointing as ckpt
from potstill.training.optim import ChannelsLastStep, create_optimizer
from potstill.training.settings import TrainingSettings

KINDS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "plain sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, fused=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
    "amsgrad": lambda weights: torch.optim.Adam(weights, lr=0.1, amsgrad=True, fused=True),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1, fused=True),
}


def network(layout=torch.channels_last):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 17, 3), nn.Conv2d(17, 5, 1), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 6, (2, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    return net.to(memory_format=layout)


def learn(net, optimizer, steps, start=0):
    for number in range(start, start + steps):
        images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(number))
        net(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_without(kind):
    found = []
    for shown in (False, True):
        net = network()
        optimizer = KINDS[kind](net.parameters())
        if shown:
            ChannelsLastStep(optimizer)
        learn(net, optimizer, 4)
        found.append((net.state_dict(), optimizer.state_dict()))
        assert [weight.stride() for weight in net.parameters()] == [w.stride() for w in network().parameters()]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind, tmp_path):
    """Moments come back from a checkpoint in plain memory, beside weights that are channels last."""
    whole = network()
    optimizer = KINDS[kind](whole.parameters())
    ChannelsLastStep(optimizer)
    learn(whole, optimizer, 2)
    weights = copy.deepcopy(whole.state_dict())
    tensors, facts = ckpt.pack_optimizer(optimizer)
    ckpt.save_checkpoint(tmp_path / "it", tensors, facts)
    learn(whole, optimizer, 2, start=2)

    resumed = network()
    resumed.load_state_dict(weights)
    again = KINDS[kind](resumed.parameters())
    ChannelsLastStep(again)
    ckpt.unpack_optimizer(again, *ckpt.load_checkpoint(tmp_path / "it"))
    learn(resumed, again, 2, start=2)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_kernel_is_given_plain_memory():
    """Otherwise it copies: that is what takes the time."""
    net = network()
    optimizer = KINDS["adamw"](net.parameters())
    ChannelsLastStep(optimizer)
    layouts = []
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: layouts.append([weight.is_contiguous() for weight in net.parameters()])
    )
    learn(net, optimizer, 2)
    optimizer.zero_grad()
    moments = [state["exp_avg"].shape for state in optimizer.state.values()]
    assert all(map(all, layouts))
    assert moments == [weight.shape for weight in net.parameters()]


def test_weights_without_gradients_and_optimizers_that_are_not_fused_are_left_alone():
    net = network()
    net[0].requires_grad_(False)
    optimizer = KINDS["adamw"](net.parameters())
    ChannelsLastStep(optimizer)
    learn(net, optimizer, 1)
    assert net[0].weight.stride() == network()[0].weight.stride()
    loose = torch.optim.SGD(network().parameters(), lr=0.1, foreach=False)
    ChannelsLastStep(loose)
    assert not loose._optimizer_step_pre_hooks


def test_the_loops_optimizers_have_it():
    for name, hooks in (("adamw", 1), ("sgd", 1), ("dot", 0)):
        optimizer = create_optimizer(list(network().named_parameters()), TrainingSettings(optimizer=name))
        assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == hooks
