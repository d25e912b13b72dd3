import math

import pytest
import torch

from potstill.functional import ttm_loss, wttm_loss
from potstill.methods.wttm import WTTM
from potstill.types import Batch, Outputs


def test_each_image_is_weighted_with_the_teachers_power_sum():
    # images: teacher (16, 1)/17 and (1, 1)/2 at gamma 1/4: power sums 3 / 17^(1/4) and 2 / 2^(1/4)
    student = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    teacher = torch.tensor([[16.0, 1.0], [1.0, 1.0]]).log()
    first = 3 / 17**0.25 * (2 / 3 * math.log(2 / 3 / 0.25) + 1 / 3 * math.log(1 / 3 / 0.75))
    second = 2 / 2**0.25 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert wttm_loss(student, teacher, gamma=0.25).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_weight_lies_between_1_and_a_power_of_the_number_of_classes():
    torch.manual_seed(0)
    student = torch.randn(1, 100, dtype=torch.float64)
    sure, unsure = torch.zeros_like(student), torch.zeros_like(student)
    sure[0, 0] = 1e6
    for teacher, weight in [(sure, 1.0), (unsure, 100**0.8)]:
        ratio = wttm_loss(student, teacher, gamma=0.2) / ttm_loss(student, teacher, gamma=0.2)
        assert ratio.item() == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[-900.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = wttm_loss(student, -student.detach(), gamma=1.0)
    assert loss.item() == pytest.approx(900, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1.0, 1.0]], dtype=dtype))


def test_weight_is_the_authors_example():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    terms = WTTM()(Outputs(student), Outputs(teacher), Batch(torch.zeros(4, 3, 1, 1), torch.arange(4)))
    torch.testing.assert_close(terms["wttm"], 4 * wttm_loss(student, teacher, gamma=0.2))
