import json
import math
import subprocess
import sys

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from potstill.errors import UsageError
from potstill.models.factory import create_model
from potstill.training.checkpointing import pack_optimizer, unpack_optimizer
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


@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "adan", "adafactor", "lars"])
def test_optimizers_of_timm_take_layer_decay_and_can_be_resumed(name):
    torch.manual_seed(0)
    data, goal = torch.randn(16, 3, 4, 4), torch.randn(16, 2)

    def make():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))
        settings = TrainingSettings(optimizer=name, lr=0.01, weight_decay=0.01)
        return net, create_optimizer(net.named_parameters(), settings, {"0.weight": 0.5})

    def step(net, optimizer):
        loss = (net(data) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    net, optimizer = make()
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.005}
    losses = [step(net, optimizer) for _ in range(20)]
    assert losses[-1] < losses[0]
    other, again = make()
    other.load_state_dict(net.state_dict())
    tensors, facts = pack_optimizer(optimizer)
    unpack_optimizer(again, {key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(facts)))
    assert step(net, optimizer) == step(other, again)
    assert step(net, optimizer) == step(other, again)


def test_a_name_in_both_is_torchs_but_for_muon():
    assert get_optimizer_class("AdamW") is torch.optim.AdamW
    assert get_optimizer_class("muon").__module__.startswith("timm.")  # torch's takes matrices alone
    with pytest.raises(UsageError, match=r"did you mean 'lamb'.*of timm: .*lion"):
        get_optimizer_class("lambb")
    for name in ("adahessian", "kron", "fusedlamb", "bnbadam"):
        with pytest.raises(UsageError, match="no optimizer"):
            get_optimizer_class(name)


def test_where_there_is_no_fused_form_torch_chooses_the_foreach_one():
    on_mps = [("a", nn.Parameter(torch.zeros(2, 2, device="meta")))]  # a device without fused kernels
    optimizer = create_optimizer(on_mps, TrainingSettings())
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (None, None)
    assert create_optimizer([("a", nn.Parameter(torch.zeros(2, 2)))], TrainingSettings()).defaults["fused"] is True


LIGHT = """
import sys, torch
from potstill.evaluation.cost import count_flops, measure_memory
from potstill.input_spec import InputSpec
from potstill.training.optim import create_optimizer
from potstill.training.settings import TrainingSettings

def train(steps, prepare):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = prepare(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        net(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net.weight.detach()

settings = TrainingSettings(optimizer="adamw", lr=0.1, weight_decay=0.1)
ours = train(3, lambda net: create_optimizer(net.named_parameters(), settings))
images = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())
assert count_flops(images, InputSpec(8)) == 2 * 36 * 2 * 27
assert measure_memory(images, InputSpec(8))["activations"] > 0
assert "torch._dynamo" not in sys.modules
plain = lambda net: torch.optim.AdamW(
    [{"params": net.weight}, {"params": net.bias, "weight_decay": 0.0}], lr=0.1, weight_decay=0.1, fused=True
)
assert torch.equal(ours, train(3, plain))
"""


def test_a_training_does_not_import_torchs_compiler():
    """Its import takes longer than a small run; the steps are those of torch's own optimizer."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
