import math

import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.errors import UsageError
from potstill.functional import cosine_loss, kd_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.cosine import Cosine


def test_loss_of_hand_worked_angles():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    student = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])  # 0, 180 and 45 degrees
    assert cosine_loss(student, teacher).item() == pytest.approx((0 + 2 + 1 - math.sqrt(0.5)) / 3, rel=1e-6)


def test_the_length_of_neither_side_matters_and_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = cosine_loss(student, teacher)
    torch.testing.assert_close(cosine_loss(7 * student, 0.1 * teacher), loss)
    loss.backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


def test_unequal_shapes_are_refused():
    with pytest.raises(UsageError, match="cosine: the embeddings"):
        cosine_loss(torch.ones(2, 3), torch.ones(2, 4))


def test_terms_through_the_adaptor():
    student, teacher = made_outputs(), made_outputs(seed=1, width=8)
    method = Cosine(weight=3.0, temperature=2.0)
    method.build(side(student), side(teacher), TrainingInfo(3))
    terms = method.distill(student, teacher, made_batch())
    first, norm, _, last = method.project
    hidden = student.embedding @ first.weight.T + first.bias
    hidden = (hidden - hidden.mean(dim=1, keepdim=True)) / (
        hidden.var(dim=1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    hidden = hidden * norm.weight + norm.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    rows = (hidden @ last.weight.T + last.bias).tolist()

    def distance(ours, theirs):
        product = sum(a * b for a, b in zip(ours, theirs, strict=True))
        return 1 - product / (math.hypot(*ours) * math.hypot(*theirs))

    wanted = 3 * sum(map(distance, rows, teacher.embedding.tolist())) / len(rows)
    assert terms["embedding"].item() == pytest.approx(wanted, rel=1e-4)
    assert terms["kd"].item() == pytest.approx(kd_loss(student.logits, teacher.logits, temperature=2.0).item())
    assert set(Cosine(kd_weight=0.0).needs.__dict__.items()) >= {("embedding", True), ("soft_targets", False)}
