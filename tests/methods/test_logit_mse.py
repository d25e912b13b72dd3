import pytest
import torch

from potstill.functional import logit_mse_loss
from potstill.methods.logit_mse import LogitMSE
from potstill.types import Batch, Outputs


def test_is_the_mean_over_images_and_classes():
    student, teacher = (
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 4.0, 0.0], [1.0, 1.0, 1.0]]),
    )
    assert logit_mse_loss(student, teacher).item() == pytest.approx((0 + 4 + 9 + 1 + 1 + 1) / 6)


def test_an_offset_counts_although_it_changes_no_probability():
    logits = torch.randn(3, 4)
    assert logit_mse_loss(logits + 2, logits).item() == pytest.approx(4, rel=1e-5)


def test_weight():
    batch = Batch(torch.zeros(1, 3, 1, 1), torch.tensor([0]))
    terms = LogitMSE(weight=3.0, ce_weight=0.0)(Outputs(torch.zeros(1, 2)), Outputs(torch.ones(1, 2)), batch)
    assert terms["logit_mse"].item() == 3
