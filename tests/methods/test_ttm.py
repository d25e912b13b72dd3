import math

import pytest
import torch

from potstill.functional import kd_loss, ttm_loss
from potstill.methods.ttm import TTM
from potstill.types import Batch, Outputs


def test_raises_the_teachers_probabilities_and_not_the_students():
    # (16, 1)/17 to the power 1/4 is (2, 1), so (2/3, 1/3); the student stays (1/4, 3/4)
    student, teacher = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[16.0, 1.0]]).log()
    by_hand = 2 / 3 * math.log(2 / 3 / 0.25) + 1 / 3 * math.log(1 / 3 / 0.75)
    assert ttm_loss(student, teacher, gamma=0.25).item() == pytest.approx(by_hand, rel=1e-5)


def test_is_hintons_loss_where_nothing_is_transformed():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(ttm_loss(student, teacher, gamma=1.0), kd_loss(student, teacher, temperature=1.0))


def test_the_gradient_is_student_minus_transformed_teacher_without_a_factor():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, requires_grad=True), torch.randn(1, 6)
    ttm_loss(student, teacher, gamma=0.1).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(1) - (0.1 * teacher).softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_sure_beyond_underflow_still_shows_its_other_classes(dtype):
    # exp(-900) is 0 in either precision, but at gamma = 1/900 the second class has a share of 1 / (1 + e)
    student = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    loss = ttm_loss(student, torch.tensor([[900.0, 0.0]], dtype=dtype), gamma=1 / 900)
    loss.backward()
    share = 1 / (1 + math.e)
    torch.testing.assert_close(student.grad, torch.tensor([[share - 0.5, 0.5 - share]], dtype=dtype))


def test_weights_are_the_authors_example():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    terms = TTM()(Outputs(student), Outputs(teacher), Batch(torch.zeros(4, 3, 1, 1), torch.arange(4)))
    torch.testing.assert_close(terms["ttm"], 45 * ttm_loss(student, teacher, gamma=0.1))
    assert terms.keys() == {"ce", "ttm"}
