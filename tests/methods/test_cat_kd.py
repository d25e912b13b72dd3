import pytest
import torch
from made_outputs import made_batch, made_outputs

from potstill.errors import UsageError
from potstill.functional import cat_kd_loss
from potstill.methods.cat_kd import CATKD, class_activation_maps


def test_mean_of_the_maps_and_the_bias_are_the_logits():
    outputs = made_outputs()
    maps = class_activation_maps(outputs.maps[0], outputs.head)
    assert torch.allclose(maps.mean(dim=(2, 3)) + outputs.head.bias, outputs.logits, atol=1e-5)


def test_against_loops():
    student, teacher = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def pooled(maps):
        half = maps.shape[2] // 2
        parts = [maps[:, :, i * half : (i + 1) * half, j * half : (j + 1) * half] for i in (0, 1) for j in (0, 1)]
        stacked = torch.stack([part.mean(dim=(2, 3)) for part in parts], dim=2)
        return stacked / stacked.pow(2).sum(dim=2, keepdim=True).sqrt()

    wanted = (pooled(student) - pooled(teacher)).pow(2).sum() / (2 * 3 * 4)
    assert cat_kd_loss(student, teacher).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_gradient_reaches_the_students_map_and_head_only():
    student, teacher = made_outputs(), made_outputs(seed=1, width=8)
    term = CATKD(weight=7)(student, teacher, made_batch())["attention"]
    ours, theirs = (class_activation_maps(side.maps[0], side.head) for side in (student, teacher))
    assert term.item() == pytest.approx(7 * cat_kd_loss(ours, theirs).item())
    term.backward()
    assert student.maps[0].grad.norm() > 0
    assert student.head.weight.grad.norm() > 0
    assert student.head.bias.grad is None
    assert teacher.maps[0].grad is None


def test_refuses_unequal_classes():
    with pytest.raises(UsageError, match="class activation maps"):
        cat_kd_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
