import pytest
import torch
from torch import nn

from potstill.training.trainer import LabelLoss, balanced_class_weights

UNKNOWN = -100
WEIGHT = torch.tensor([0.5, 2.0, 1.0])


@pytest.mark.parametrize(("weight", "smoothing"), [(None, 0.0), (None, 0.1), (WEIGHT, 0.0)])
def test_where_torch_weighs_images_the_value_is_torchs(weight: torch.Tensor | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN, 1])
    known = labels != UNKNOWN
    wanted = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(logits[known], labels[known])
    assert LabelLoss(weight, smoothing)(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)


# log p of softmax(2, 0, 0): 2 - ln(e^2 + 2) = -0.2395447662, and -2.2395447662; of equal logits: -ln 3 = -1.0986122887
LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_smoothing_by_hand() -> None:
    """Image 0, class 0: 0.8 * 0.2395 + 0.2 / 3 * (0.2395 + 2 * 2.2395) = 0.5062; image 1: 1.0986 whatever is spread.
    Weights 0.5 and 2: (0.5 * 0.5062 + 2 * 1.0986) / 2.5.
    """
    found = LabelLoss(WEIGHT, 0.2)(LOGITS, torch.tensor([0, 1]))
    assert found.item() == pytest.approx((0.5 * 0.5062114 + 2 * 1.0986123) / 2.5, rel=1e-6)


def test_mixed_labels_by_hand() -> None:
    """Image 0 is 3/4 class 0 and 1/4 class 1: its weight 3/4 * 0.5 + 1/4 * 2 = 0.875, its loss 3/4 * 0.2395 + 1/4 *
    2.2395 = 0.7395; image 1 is class 2 with weight 1.
    """
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]])
    found = LabelLoss(WEIGHT)(LOGITS, shares)
    assert found.item() == pytest.approx((0.875 * 0.7395448 + 1.0986123) / 1.875, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_unmixed_shares_are_labels(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    shares = nn.functional.one_hot(labels, 3).float()
    loss = LabelLoss(WEIGHT, smoothing)
    torch.testing.assert_close(loss(logits, shares), loss(logits, labels))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_best_answer_to_an_image_is_its_label_whatever_the_weights(smoothing: float, mixed: bool) -> None:
    """600 to 6 images.  At the minimum over an image's logits the probabilities are its smoothed shares; under torch's
    combination they are 0.34 and 0.66 for an image of the large class.
    """
    weight = balanced_class_weights(torch.tensor([600, 6]))
    share = 0.9 if mixed else 1.0
    target = torch.tensor([[share, 1 - share]]) if mixed else torch.tensor([0])
    wanted = (1 - smoothing) * share + smoothing / 2
    logits = torch.tensor([[wanted, 1 - wanted]]).clamp(min=1e-9).log().requires_grad_(True)
    LabelLoss(weight, smoothing)(logits, target).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-6


def test_autocast_does_not_round_the_weights() -> None:
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.2, 0.7]])
    loss, logits = LabelLoss(torch.tensor([1.001, 1.003, 50.07])), torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(logits, shares)
    assert torch.equal(found, loss(logits, shares))


def test_a_batch_without_labels_gives_no_loss_and_no_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = LabelLoss(torch.ones(3))(logits, torch.full((4,), UNKNOWN))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    assert nn.CrossEntropyLoss()(logits, torch.full((4,), UNKNOWN)).isnan()  # which is why


def test_weights_by_hand_and_for_a_class_without_images() -> None:
    torch.testing.assert_close(balanced_class_weights(torch.tensor([6, 3, 0])), torch.tensor([0.5, 1.0, 3.0]))
