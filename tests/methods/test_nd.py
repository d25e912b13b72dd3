import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.errors import UsageError
from potstill.functional import kd_loss, nd_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.nd import ND


def built(width=5, **options):
    student, teacher = made_outputs(), made_outputs(seed=1, width=width, grad=False)
    method = ND(**options)
    method.build(side(student), side(teacher), TrainingInfo(3))
    return method, student, teacher


def prepared(method, teacher, batch):
    method.prepare(lambda: iter([(teacher, batch)]))
    return method


def test_gradient_flows_through_the_students_length_where_it_is_the_longer():
    # d/df of 1 - f e / |f| at f = (3, 4), e = (1, 0): -(1, 0)/5 + 3 (3, 4)/125
    student = torch.tensor([[3.0, 4.0]], requires_grad=True)
    nd_loss(student, torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([[2.0, 0.0]])).backward()
    assert student.grad.flatten().tolist() == pytest.approx([-16 / 125, 12 / 125])
    # Where the teacher's is longer, only the numerator has one.
    student = torch.tensor([[3.0, 4.0]], requires_grad=True)
    nd_loss(student, torch.tensor([[0.0, 10.0]]), torch.tensor([0]), torch.tensor([[2.0, 0.0]])).backward()
    assert student.grad.flatten().tolist() == pytest.approx([-0.1, 0])


def test_embeddings_of_zeros_are_finite():
    student = torch.zeros(2, 3, requires_grad=True)
    loss = nd_loss(student, torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 1
    assert student.grad.isfinite().all()


def test_class_means_come_from_a_pass_over_the_teachers_embeddings():
    method, _, teacher = built()
    batch = made_batch()
    halves = [
        (type(teacher)(teacher.logits[part], embedding=teacher.embedding[part]), made_batch())
        for part in (slice(3), slice(3, 6))
    ]
    for (_, half), part in zip(halves, (slice(3), slice(3, 6)), strict=True):
        half.labels = batch.labels[part]
    method.prepare(lambda: iter(halves))
    for label in range(3):
        members = [teacher.embedding[i] for i in range(6) if batch.labels[i] == label]
        assert torch.allclose(method.class_means[label], sum(members) / len(members))


def test_refuses_to_point_nowhere():
    method, student, teacher = built()
    method.start_epoch(0, 10)
    with pytest.raises(UsageError, match=r"call distiller.prepare\(batches\) first"):
        method.distill(student, teacher, made_batch())


def test_means_survive_a_checkpoint():
    method, student, teacher = built()
    prepared(method, teacher, made_batch())
    resumed, _, _ = built()
    resumed.load_state_dict(method.state_dict())
    for one in (method, resumed):
        one.start_epoch(3, 10)
    assert torch.equal(
        resumed.distill(student, teacher, made_batch())["norm"], method.distill(student, teacher, made_batch())["norm"]
    )


def test_warm_up_counts_from_0():
    method, student, teacher = built(kd_weight=2)
    prepared(method, teacher, made_batch())
    full = 2 * kd_loss(student.logits, teacher.logits, temperature=4.0).item()
    for epoch, share in ((0, 0.0), (5, 0.25), (20, 1.0), (100, 1.0)):
        method.start_epoch(epoch, 240)
        assert method.distill(student, teacher, made_batch())["kd"].item() == pytest.approx(share * full)


def test_another_width_is_translated_by_a_layer_that_learns():
    method, student, teacher = built(width=9)
    prepared(method, teacher, made_batch())
    method.start_epoch(0, 10)
    method.distill(student, teacher, made_batch())["norm"].backward()
    assert method.translate[2].weight.grad.norm() > 0
    assert not list(built()[0].parameters())


def test_a_collapsed_teacher_is_named():
    method, _, teacher = built()
    teacher.embedding = torch.zeros_like(teacher.embedding)
    with pytest.raises(UsageError, match="its embedding is 0 for every training image"):
        prepared(method, teacher, made_batch())
