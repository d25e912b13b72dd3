import math

import pytest
import torch

from potstill.functional import bkd_loss
from potstill.methods.bkd import BKD
from potstill.types import Batch, Outputs


def test_equals_the_formula_computed_slowly():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    total = 0.0
    for zs, zt in zip(student.tolist(), teacher.tolist(), strict=True):
        for k in range(3):
            p, q = math.exp(zt[k]) / sum(map(math.exp, zt)), 1 / (1 + math.exp(-zs[k]))
            total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    assert bkd_loss(student, teacher).item() == pytest.approx(total / 12, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[-900.0, 900.0]], dtype=dtype, requires_grad=True)
    loss = bkd_loss(student, -student.detach())
    loss.backward()
    assert loss.item() == pytest.approx(900, rel=1e-6)
    torch.testing.assert_close(student.grad, torch.tensor([[-0.5, 0.5]], dtype=dtype))


def test_weight():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    batch = Batch(torch.zeros(4, 3, 1, 1), torch.tensor([0, 1, 2, 0]))
    terms = BKD(weight=5.0, ce_weight=0.0)(Outputs(student), Outputs(teacher), batch)
    torch.testing.assert_close(terms, {"bkd": 5 * bkd_loss(student, teacher)})
