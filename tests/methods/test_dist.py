import numpy as np
import pytest
import torch

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import dist_inter_loss, dist_intra_loss, dist_loss
from potstill.methods.dist import DIST
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return torch.randn(batch, classes, dtype=torch.float64), torch.randn(batch, classes, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_pearsons_correlation_of_numpy(temperature):
    student, teacher = made()
    p, q = ((z / temperature).softmax(1).numpy() for z in (teacher, student))
    inter = temperature**2 * np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = temperature**2 * np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    # numpy adds nothing to the product of the norms
    assert dist_inter_loss(student, teacher, temperature=temperature).item() == pytest.approx(inter, rel=1e-5)
    assert dist_intra_loss(student, teacher, temperature=temperature).item() == pytest.approx(intra, rel=1e-5)
    whole = dist_loss(student, teacher, temperature=temperature, beta=2.0, gamma=0.5)
    assert whole.item() == pytest.approx(2 * inter + 0.5 * intra, rel=1e-5)


def test_eps_is_added_to_the_product_of_the_norms():
    # Deviations (-1/4, 1/4) on both sides: norms squared 1/8, product 1/8.  With eps = 1/8 the correlation halves.
    logits = torch.tensor([[1.0, 3.0]]).log()
    found = dist_inter_loss(logits, logits, temperature=1.0, eps=1 / 8)
    assert found.item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_without_probability_count_as_uncorrelated_and_are_finite(dtype):
    student = torch.tensor([[0.0, 1.0, -900.0], [1.0, 0.0, -900.0]], dtype=dtype, requires_grad=True)
    loss = dist_intra_loss(student, student.detach().clone(), temperature=1.0)
    assert loss.item() == pytest.approx(1 / 3, rel=1e-4)  # two classes correlate wholly, the third not at all
    (loss + dist_inter_loss(student, student.detach().flip(0), temperature=1.0)).backward()
    assert student.grad.isfinite().all()


def test_two_classes_leave_only_the_order_to_the_sample_wise_part():
    student = torch.tensor([[2.0, 0.0], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = dist_inter_loss(student, torch.tensor([[0.1, 0.0], [5.0, 9.0]], dtype=torch.float64), temperature=1.0)
    assert loss.item() == pytest.approx(1.0, rel=1e-5)  # correlations 1 and -1
    loss.backward()
    assert student.grad.abs().max() < 1e-6


def test_two_classes_are_refused_as_nothing_tells_them_apart():
    student, teacher = made(classes=2)
    p = torch.softmax(student, 1)[:, :1]
    shifted = torch.cat([p, 1 - p], 1) + 0.2 * (1 - p.max()) * torch.tensor([1.0, -1.0])
    assert shifted.sum(1) == pytest.approx(1.0)
    before, after = (dist_intra_loss(each, teacher, temperature=1.0).item() for each in (student, shifted.log()))
    assert after == pytest.approx(before)  # though the probabilities of a class are higher for all images
    with pytest.raises(UsageError, match="Use method kd"):
        Distiller(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), DIST(), example=torch.randn(6, 4))


def test_terms_are_the_release_under_its_outer_weight_of_2():
    student, teacher = made()
    terms = DIST()(
        Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), torch.zeros(6, dtype=torch.int64))
    )
    release = dist_loss(student, teacher, temperature=4.0, beta=1.0, gamma=1.0)
    torch.testing.assert_close(terms["inter"] + terms["intra"], 2 * release)
    assert DIST().needs.several
