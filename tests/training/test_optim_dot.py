import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.training.optim import DOT, GradientAccumulator, create_optimizer, get_optimizer_class
from potstill.training.settings import TrainingSettings
from potstill.types import Step


def test_two_steps_worked_by_hand():
    both, label_only, taught_only = (nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0, 4.0))
    optimizer = DOT([both, label_only, taught_only], lr=0.1, momentum=0.5, delta=0.2, weight_decay=0.1)
    for _ in range(2):
        optimizer.backward((3 * both + label_only).sum(), (5 * both + 2 * taught_only).sum())
        optimizer.step()
        optimizer.zero_grad()
    # both: task 3 + .1 * 1 = 3.1, taught 5, w = 1 - .81 = .19; then .3 * 3.1 + 3 + .019 = 3.949 and .7 * 5 + 5 = 8.5,
    # w = .19 - 1.2449.  label_only: 1 + .2 = 1.2, w = 1.88; then .5 * 1.2 + 1 + .188 = 1.788, w = 1.7012.
    # taught_only: 2 + .4 = 2.4, w = 3.76; then .5 * 2.4 + 2 + .376 = 3.576, w = 3.4024.
    assert [p.item() for p in (both, label_only, taught_only)] == pytest.approx([-1.0549, 1.7012, 3.4024])


def losses(net, x, step):
    """Terms of labels and of a teacher; the bias of the first layer is left out of the labels'."""
    hidden = nn.functional.linear(x, net[0].weight)
    labels = net[2](torch.tanh(hidden)).square().mean()
    distillation = (net[2](torch.tanh(net[0](x))) - step).abs().mean()
    return labels, distillation


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_without_delta_it_is_sgd(clip, gradient_accumulation_steps):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("dot", "sgd"):
        net = network().double()
        settings = TrainingSettings(optimizer=name, lr=0.05, momentum=0.9, weight_decay=0.01, dot_delta=0.0)
        optimizer = create_optimizer(net.named_parameters(), settings)
        gradients = GradientAccumulator(optimizer, list(net.parameters()))
        for step in range(6):
            for part in x.double().chunk(gradient_accumulation_steps):
                labels, distillation = losses(net, part, step)
                terms = {"ce": labels, "kd": distillation}
                if step == 3:  # a buffer goes on through a step without its gradient
                    del terms["kd"]
                if step == 4:
                    del terms["ce"]
                gradients.add(Step(torch.zeros(1, 2), terms), gradient_accumulation_steps)
            if clip is not None:
                gradients.clip(clip)
            optimizer.step()
            optimizer.zero_grad()
        found[name] = [p.detach() for p in net.parameters()]
    start = list(network().double().parameters())
    for a, b, before in zip(found["dot"], found["sgd"], start, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        assert not torch.allclose(a, before, atol=1e-3)


def test_clipping_bounds_the_sum_and_keeps_the_proportion():
    weight = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = DOT([weight], lr=1.0)
    optimizer.backward(weight[0] * 3, weight[0] * 3 + weight[1] * 8)  # sum (6, 8): norm 10
    optimizer.clip(5.0)
    optimizer.step()
    assert weight.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)
    assert optimizer.state[weight]["task"].tolist() == pytest.approx([1.5, 0.0], rel=1e-6)
    assert optimizer.state[weight]["distillation"].tolist() == pytest.approx([1.5, 4.0], rel=1e-6)
    optimizer.zero_grad()
    optimizer.backward(weight.sum() * 0.1, None)
    optimizer.clip(5.0)  # already smaller
    assert weight.grad.tolist() == pytest.approx([0.1, 0.1])


def test_no_label_terms_at_all():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = DOT([weight], lr=0.1, momentum=0.5, delta=0.2)
    gradients = GradientAccumulator(optimizer, [weight])
    for _ in range(2):
        gradients.add(Step(torch.zeros(1, 2), {"kd": 2 * weight.sum()}))
        optimizer.step()
        optimizer.zero_grad()
    assert weight.item() == pytest.approx(1 - 0.2 - 0.1 * (0.5 * 2 + 2))


def test_only_the_named_terms_are_the_labels():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = DOT([weight], lr=0.1)
    step = Step(torch.zeros(1, 2), {"ce": weight.sum(), "hard": 2 * weight.sum(), "kd": 4 * weight.sum()})
    step.label_terms = frozenset({"ce", "hard"})
    GradientAccumulator(optimizer, [weight]).add(step)
    optimizer.step()
    assert optimizer.state[weight]["task"].item() == 3
    assert optimizer.state[weight]["distillation"].item() == 4


def test_what_cannot_be():
    assert get_optimizer_class("DOT") is DOT
    for momentum, delta in ((0.9, 0.1), (0.05, 0.075), (0.9, -0.1)):
        with pytest.raises(ValueError, match="delta"):
            DOT([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=momentum, delta=delta)
    with pytest.raises(UsageError, match=r"training\.optimizer dot: momentum - delta must be"):
        create_optimizer(
            nn.Linear(1, 1).named_parameters(), TrainingSettings(optimizer="dot", momentum=0.95, dot_delta=0.1)
        )
