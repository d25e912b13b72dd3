import pytest
import torch

from potstill.functional import standardise


def test_rows_have_mean_0_and_unbiased_deviation_1():
    # (0, 3, 6, 7): mean 4, squared deviations 16 + 1 + 4 + 9 = 30, over 3: 10
    found = standardise(torch.tensor([[0.0, 3.0, 6.0, 7.0]], dtype=torch.float64))
    expected = torch.tensor([[-4.0, -1.0, 2.0, 3.0]], dtype=torch.float64) / 10**0.5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_scale_and_offset_do_not_matter():
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(standardise(7 * logits - 100), standardise(logits), rtol=1e-6, atol=1e-6)


def test_eps_is_added_to_the_deviation_and_not_to_the_variance():
    # (-1, 0, 1) has deviation 1: over 1 + 1, and not over the root of 1 + 1
    found = standardise(torch.tensor([[-1.0, 0.0, 1.0]]), eps=1.0)
    assert found.tolist() == [[-0.5, 0.0, 0.5]]


def test_equal_logits_become_0_with_a_finite_gradient():
    logits = torch.full((1, 4), 2.0, requires_grad=True)
    found = standardise(logits)
    assert found.tolist() == [[0.0] * 4]
    found[0, 0].backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gap", [0.1, 900.0])
def test_two_classes_become_constants(gap):
    found = standardise(torch.tensor([[gap, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, -(0.5**0.5)]], dtype=torch.float64), rtol=1e-5, atol=0)


def test_half_precision_is_raised():
    assert standardise(torch.randn(2, 3).bfloat16()).dtype == torch.float32
