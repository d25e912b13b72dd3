import math

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from potstill.errors import UsageError
from potstill.models.factory import create_model
from potstill.training.optim import create_optimizer, get_optimizer_class, layer_lr_scales, lr_factor
from potstill.training.settings import TrainingSettings


def test_biases_and_norms_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = create_optimizer(net.named_parameters(), TrainingSettings(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in net.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }
    everywhere = create_optimizer(net.named_parameters(), TrainingSettings(weight_decay=0.1, decay_all=True))
    assert {group["weight_decay"] for group in everywhere.param_groups} == {0.1}


def test_layer_decay_lowers_the_rate_block_by_block():
    net = create_model("vit_tiny_patch16_224", 3, size=32)
    scales = layer_lr_scales(net, 0.5)
    groups = param_groups_layer_decay(net, layer_decay=0.5)
    peers = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {name: peers[id(p)] for name, p in net.named_parameters()} == scales
    assert scales["head.weight"] == 1.0 > scales["blocks.11.mlp.fc2.weight"] > scales["blocks.10.mlp.fc2.weight"]
    optimizer = create_optimizer(net.named_parameters(), TrainingSettings(lr=0.1, weight_decay=0.2), scales)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(net.head.weight)] == (0.1, 0.2)
    assert rate[id(net.blocks[11].mlp.fc2.bias)] == (0.1 * scales["blocks.11.mlp.fc2.bias"], 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert len(rate) == len(list(net.parameters()))


def test_layer_decay_needs_a_network_that_knows_its_blocks():
    with pytest.raises(UsageError, match=r"layer_decay takes the blocks of a network from timm, and Sequential"):
        layer_lr_scales(nn.Sequential(nn.Linear(2, 2)), 0.5)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", "SGD"), ("adamw", "AdamW"), ("NAdam", "NAdam"), ("rmsprop", "RMSprop")]
)
def test_optimizers_by_name(name, kind):
    optimizer = create_optimizer(nn.Linear(2, 2).named_parameters(), TrainingSettings(optimizer=name, lr=0.3))
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_sgd_step_worked_by_hand():
    weight = nn.Parameter(torch.tensor([[1.0]]))
    settings = TrainingSettings(optimizer="sgd", lr=0.1, momentum=0.5, weight_decay=0.2)
    optimizer = create_optimizer([("w", weight)], settings)
    for _ in range(2):
        weight.grad = torch.tensor([[3.0]])
        optimizer.step()
    # first: v = 3 + .2 * 1 = 3.2, w = 1 - .32 = .68; then v = .5 * 3.2 + 3 + .2 * .68 = 4.736, w = .68 - .4736
    assert weight.item() == pytest.approx(0.2064)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        get_optimizer_class("adamww")
    with pytest.raises(UsageError, match="SGD takes no 'moment'; did you mean 'momentum'"):
        create_optimizer(
            nn.Linear(1, 1).named_parameters(), TrainingSettings(optimizer="sgd", optimizer_options={"moment": 1})
        )
    with pytest.raises(UsageError, match="Invalid beta parameter"):
        create_optimizer(nn.Linear(1, 1).named_parameters(), TrainingSettings(optimizer_options={"betas": [2, 2]}))


def test_cosine_and_warm_up():
    factor = lr_factor(TrainingSettings(epochs=10, schedule="cosine", warmup_epochs=2, min_lr_ratio=0.1), 5)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])  # 1/10, 5/10, 10/10 of the warm-up
    assert factor(10) == 1.0
    assert factor(30) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)  # half of the 40 that follow
    assert factor(50) == pytest.approx(0.1)


def test_steps_of_the_cifar_protocol():
    settings = TrainingSettings(epochs=240, schedule="step", milestones=[150, 180, 210], gamma=0.1)
    factor = lr_factor(settings, 782)
    found = [factor(epoch * 782) for epoch in (0, 149, 150, 180, 210, 239)]
    assert found == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])
    assert factor(150 * 782 - 1) == 1
