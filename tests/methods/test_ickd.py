import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.errors import UsageError
from potstill.functional import ickd_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.ickd import ICKD


def slow_rows(features):
    gram = [[(a * b).sum().item() for b in features] for a in features]
    return [[value / sum(entry**2 for entry in row) ** 0.5 for value in row] for row in gram]


def test_against_loops_with_unequal_sizes():
    student, teacher = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    wanted = 0.0
    for ours, theirs in zip(map(slow_rows, student), map(slow_rows, teacher), strict=True):
        wanted += sum((ours[i][j] - theirs[i][j]) ** 2 for i in range(3) for j in range(3))
    assert ickd_loss(student, teacher).item() == pytest.approx(wanted / (3 * 2), rel=1e-12)


def test_adapter_learns_and_the_teacher_is_constant():
    student, teacher = made_outputs(), made_outputs(seed=1, width=8, size=2)
    method = ICKD()
    method.build(side(student), side(teacher), TrainingInfo(3))
    assert [name for name, _ in method.named_parameters()] == [
        "adapter.conv.weight",
        "adapter.norm.weight",
        "adapter.norm.bias",
    ]
    method.distill(student, teacher, made_batch())["correlation"].backward()
    assert method.adapter.conv.weight.grad.norm() > 0
    assert student.maps[0].grad.norm() > 0
    assert teacher.maps[0].grad is None


def test_refuses_unequal_channels():
    with pytest.raises(UsageError, match="as many images and channels"):
        ickd_loss(torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 1, 1))
