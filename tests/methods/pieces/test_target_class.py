import math

import pytest
import torch

from potstill.errors import UsageError
from potstill.methods.numerics import binary_log_probs, drop_target, require_three_classes


def test_without_target_leaves_out_each_images_own_class():
    logits = torch.arange(12.0).view(3, 4)
    found = drop_target(logits, torch.tensor([0, 2, 3]))
    assert found.tolist() == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]


def test_the_two_bins_are_the_class_and_the_sum_of_the_others():
    probabilities = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    found = binary_log_probs(probabilities.log(), torch.tensor([1, 1]))
    torch.testing.assert_close(found.exp(), torch.tensor([[0.2, 0.8], [0.6, 0.4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rest_is_finite_where_one_minus_p_is_0(dtype):
    logits = torch.tensor([[900.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    found = binary_log_probs(logits, torch.tensor([0]))
    # log(2 exp(-900)) = ln 2 - 900
    assert found[0, 1].item() == pytest.approx(math.log(2) - 900, rel=1e-6)
    found[0, 1].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.5, 0.5]], dtype=dtype))


def test_two_classes_are_refused_with_the_method_to_take_instead():
    with pytest.raises(UsageError, match=r"dkd compares .* of 2 classes only one is left.* Use method kd"):
        require_three_classes("dkd", 2)
    require_three_classes("dkd", 3)
