import copy

import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.functional import kd_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.vkd import VkD


def built(width):
    student, teacher = made_outputs(), made_outputs(seed=1, width=width)
    method = VkD()
    method.build(side(student), side(teacher), TrainingInfo(3))
    return method, student, teacher


def test_terms_by_hand():
    method, student, teacher = built(8)
    terms = method.distill(student, teacher, made_batch())
    projected = student.maps[0].mean(dim=(2, 3)) @ method.project.weight.T
    theirs = teacher.maps[0].mean(dim=(2, 3))
    theirs = (theirs - theirs.mean(dim=1, keepdim=True)) / (
        theirs.var(dim=1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    distances = (projected - theirs).abs()
    wanted = torch.where(distances < 1, distances.square() / 2, distances - 0.5).mean()
    assert terms["feature"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert terms["kd"].item() == pytest.approx(kd_loss(student.logits, teacher.logits, temperature=1.0).item())


@pytest.mark.parametrize("width", [8, 5, 3])
def test_projection_stays_orthogonal_while_it_learns(width):
    method, student, teacher = built(width)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    before = method.project.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        method.distill(student, teacher, made_batch())["feature"].backward(retain_graph=True)
        optimizer.step()
    weight = method.project.weight.detach()
    gram = weight.T @ weight if width >= 5 else weight @ weight.T
    assert torch.allclose(gram, torch.eye(min(width, 5)), atol=1e-5)
    assert not torch.allclose(weight, before)
    assert teacher.maps[0].grad is None


def test_can_be_copied_and_restored():
    method, _, _ = built(8)
    other = copy.deepcopy(method)
    other.load_state_dict(method.state_dict())
    assert torch.allclose(other.project.weight, method.project.weight)
