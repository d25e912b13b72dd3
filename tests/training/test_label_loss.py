import pytest
import torch
from torch import nn

from potstill.training.label_loss import KnownLabels

UNKNOWN = -100


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_it_is_the_mean_over_the_images_with_a_label(weight: torch.Tensor | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN, 1])
    known = labels != UNKNOWN
    wanted = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(logits[known], labels[known])
    assert KnownLabels(weight, smoothing)(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_batch_without_labels_gives_no_loss_and_no_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = KnownLabels(torch.ones(3))(logits, torch.full((4,), UNKNOWN))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    assert nn.CrossEntropyLoss()(logits, torch.full((4,), UNKNOWN)).isnan()  # which is why
