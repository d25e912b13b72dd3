import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.features.student_surgery import ProjectedHead
from potstill.functional import simkd_loss
from potstill.methods.combined import Combined
from potstill.methods.simkd import SimKD

IMAGES, LABELS = torch.randn(6, 3, 16, 16), torch.arange(6) % 5


def network(width, strides=(2, 2), *, classes=5, bias=True):
    layers, inputs = [], 3
    for stride in strides:
        layers += [nn.Conv2d(inputs, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes, bias=bias))


def distiller(student, teacher, method=None, **options):
    return Distiller(student, teacher, method or SimKD(**options), example=IMAGES)


def test_deployed_network_ends_in_the_teachers_head():
    student, teacher = network(4), network(8)
    joined = distiller(student, teacher)
    assert isinstance(joined.student, ProjectedHead)
    assert joined.student.network is student
    assert torch.equal(joined.student.head.weight, teacher[-1].weight)
    assert torch.equal(joined.student.head.bias, teacher[-1].bias)
    names = [name for name, _ in joined.trained_parameters()]
    assert any("projector" in name for name in names)
    assert not any("student.head" in name or "teacher" in name for name in names)


@pytest.mark.parametrize(("ours", "theirs"), [((2, 2), (2, 2)), ((2, 1), (2, 2)), ((2, 2), (2, 1))])
def test_only_term_is_the_difference_of_the_maps(ours, theirs):
    joined = distiller(network(4, ours), network(8, theirs), weight=3.0)
    step = joined(IMAGES, LABELS)
    assert step.terms.keys() == {"feature"}
    with torch.no_grad():
        target = joined.teacher.networks[0][:6](IMAGES)
        joined.student.network[:6](IMAGES)
        features = joined.student.network[5].take()
        if features.shape[2] > target.shape[2]:
            features = features.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean(dim=(3, 5))
        projected = joined.student.projector(features)
        if target.shape[2] > projected.shape[2]:
            target = target.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean(dim=(3, 5))
    wanted = 3 * (projected - target).square().mean()
    assert step.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(
        step.logits, projected.mean(dim=(2, 3)) @ joined.student.head.weight.T + joined.student.head.bias, atol=1e-5
    )


def test_training_moves_student_and_projector_but_not_the_head():
    joined = distiller(network(4), network(8, bias=False))
    head, own = joined.student.head.weight.clone(), joined.student.network[-1].weight.clone()
    optimizer = torch.optim.SGD([parameter for _, parameter in joined.trained_parameters()], lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        step = joined(IMAGES, LABELS)
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < losses[0]
    assert joined.student.projector[0].weight.grad.norm() > 0
    assert joined.student.network[0].weight.grad.norm() > 0
    assert torch.equal(joined.student.head.weight, head)
    assert torch.equal(joined.student.network[-1].weight, own)
    assert joined.student.head.bias is None


def test_evaluation_uses_the_joint_path():
    joined = distiller(network(4), network(8)).eval()
    assert torch.equal(joined(IMAGES, LABELS).logits, joined.student(IMAGES))


def test_works_beside_another_method_and_with_named_layers():
    method = Combined(methods=[{"name": "kd"}, {"name": "simkd"}])
    step = distiller(network(4), network(8), method)(IMAGES, LABELS)
    assert step.terms.keys() == {"ce", "kd", "feature"}
    joined = Distiller(network(4), network(8), SimKD(), example=IMAGES, feature_pairs=[("2", "5")])
    assert joined.student.facts["stage"] == "2"
    assert joined(IMAGES, LABELS).loss.isfinite()


def test_method_can_be_used_again():
    method = SimKD()
    for _ in range(2):
        assert distiller(network(4), network(8), method)(IMAGES, LABELS).loss.isfinite()


def test_refusals():
    with pytest.raises(UsageError, match="one teacher's head, got 2 teachers; camkd"):
        distiller(network(4), [network(8), network(8)])
    hidden = nn.Sequential(*network(8)[:-1], nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(UsageError, match="needs a head that reads the mean of the last feature map"):
        distiller(network(4), hidden)
    collapsed = network(8)
    nn.init.constant_(collapsed[4].bias, -100.0)  # of the last BatchNorm: no unit passes the ReLU
    with pytest.raises(UsageError, match=r"those of the teacher \(Sequential\) are all 0: its units no longer respond"):
        distiller(network(4), collapsed)
    with pytest.raises(UsageError, match=r"was changed already \(projected_head"):
        distiller(distiller(network(4), network(8)).student, network(8))
    with pytest.raises(UsageError, match="as many images and channels"):
        simkd_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1))
