import pytest
import torch
import torch.nn.functional as F
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods import create_method
from potstill.methods.kd import KD
from potstill.methods.pct import PCT, pct_loss

STUDENT = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.2, 0.1], [0.0, 2.0, 0.0], [1.0, 1.5, 0.0]])
PREVIOUS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 4.0], [0.0, 2.0, 1.0]])
LABELS = torch.tensor([0, 0, 2, -1])  # right, wrong, right, without a label


def test_kl_is_torchs_own_on_the_images_that_the_previous_model_has_right() -> None:
    each = F.kl_div((STUDENT / 2).log_softmax(1), (PREVIOUS / 2).softmax(1), reduction="none").sum(1) * 4
    found = pct_loss(STUDENT, PREVIOUS, LABELS, base=0.0, focus=1.0, temperature=2.0)
    assert found.item() == pytest.approx(float(each[0] + each[2]) / 4, rel=1e-5)
    found = pct_loss(STUDENT, PREVIOUS, LABELS, base=0.5, focus=2.0, temperature=2.0)
    assert found.item() == pytest.approx(float(each.sum() * 0.5 + 2 * (each[0] + each[2])) / 4, rel=1e-5)


def test_logits_by_hand() -> None:
    # Squares of the first image: 1 + 0 + 1, of the third: 0 + 1 + 16.
    found = pct_loss(STUDENT, PREVIOUS, LABELS, base=0.0, focus=1.0, distance="logits")
    assert found.item() == pytest.approx((2 / 2 + 17 / 2) / 4)


def test_a_mixed_image_counts_by_the_share_of_the_class_that_is_predicted() -> None:
    mixed = torch.tensor([[0.7, 0.3, 0.0]])
    one = pct_loss(STUDENT[:1], PREVIOUS[:1], LABELS[:1], base=0.0, focus=1.0)
    assert pct_loss(STUDENT[:1], PREVIOUS[:1], mixed, base=0.0, focus=1.0).item() == pytest.approx(0.7 * one.item())


def test_no_gradient_reaches_the_previous_model() -> None:
    student, previous = STUDENT.clone().requires_grad_(), PREVIOUS.clone().requires_grad_()
    pct_loss(student, previous, LABELS, base=1.0, focus=1.0).backward()
    assert previous.grad is None
    assert student.grad is not None


def test_unknown_distances_and_negative_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="distance"):
        pct_loss(STUDENT, PREVIOUS, LABELS, base=0.0, focus=1.0, distance="cosine")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="focus"):
        pct_loss(STUDENT, PREVIOUS, LABELS, base=0.0, focus=-1.0)


class Fixed(nn.Module):
    """Logits that do not depend on the images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def around_kd() -> PCT:
    return PCT(base_method={"name": "kd"})


IMAGES, KNOWN = torch.zeros(3, 3, 4, 4), torch.tensor([0, 0, 2])
TEACHER = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize("weights", [None, [1.0, 0.0], [2.0, 2.0]])
def test_the_inner_method_hears_its_teacher_and_not_the_previous_model(weights) -> None:
    both = [Fixed(TEACHER), Fixed(PREVIOUS[:3])]
    step = Distiller(Fixed(STUDENT[:3]), both, around_kd(), teacher_weights=weights)(IMAGES, KNOWN)
    alone = Distiller(Fixed(STUDENT[:3]), Fixed(TEACHER), KD())(IMAGES, KNOWN)
    assert step.terms["kd"].item() == pytest.approx(alone.terms["kd"].item())
    assert step.terms["ce"].item() == pytest.approx(alone.terms["ce"].item())
    expected = pct_loss(STUDENT[:3], PREVIOUS[:3], KNOWN, base=0.0, focus=1.0)
    assert step.terms["flips"].item() == pytest.approx(expected.item())


def test_several_teachers_are_combined_without_the_previous_model() -> None:
    networks = [Fixed(TEACHER), Fixed(TEACHER + torch.tensor([0.0, 1.0, 2.0])), Fixed(PREVIOUS[:3])]
    step = Distiller(Fixed(STUDENT[:3]), networks, around_kd(), teacher_weights=[3.0, 1.0, 0.0])(IMAGES, KNOWN)
    mean = Fixed(TEACHER + torch.tensor([0.0, 0.25, 0.5]))
    alone = Distiller(Fixed(STUDENT[:3]), mean, KD())(IMAGES, KNOWN)
    assert step.terms["kd"].item() == pytest.approx(alone.terms["kd"].item(), rel=1e-5)
    with pytest.raises(UsageError, match="the weight 0"):
        Distiller(Fixed(STUDENT[:3]), networks, around_kd())


def test_beside_labels_alone_the_only_teacher_is_the_previous_model() -> None:
    step = Distiller(Fixed(STUDENT[:3]), Fixed(PREVIOUS[:3]), PCT())(IMAGES, KNOWN)
    assert step.terms["ce"].item() == pytest.approx(F.cross_entropy(STUDENT[:3], KNOWN).item())
    assert set(step.terms) == {"ce", "flips"}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a teacher before the previous model"):
        Distiller(Fixed(STUDENT[:3]), Fixed(PREVIOUS[:3]), around_kd())
    with pytest.raises(UsageError, match="at reads other layers"):
        create_method("pct", base_method={"name": "at"})
