import math

import pytest
import torch
import torch.nn.functional as F
from made_outputs import made_batch, made_outputs, side

from potstill.errors import UsageError
from potstill.functional import crd_constants, crd_loss, crd_memory
from potstill.methods.base import TrainingInfo
from potstill.methods.crd import CRD, ClassSampler

LABELS = torch.arange(30) % 3


def built(labels=LABELS, **options):
    student, teacher = made_outputs(), made_outputs(seed=1, width=8, grad=False)
    method = CRD(**{"negatives": 12, "dim": 4, **options})
    method.build(side(student), side(teacher), TrainingInfo(3, labels))
    return method, student, teacher


def units(count, dim):
    return F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("samples", [7, 40])  # by all products, and by gathering rows (more samples than 3 * 4)
def test_against_loops(samples):
    student, teacher, ours, theirs = units(2, 4), units(2, 4), units(samples, 4), units(samples, 4)
    contrast = torch.tensor([[1, 4, 6], [0, 5, 2]])
    constants = torch.tensor([30.0, 50.0], dtype=torch.float64)
    total = 0.0
    for unit, memory, z in ((student, theirs, 30.0), (teacher, ours, 50.0)):
        for i in range(2):
            p = [math.exp(torch.dot(unit[i], memory[j]).item() / 0.07) / z for j in contrast[i]]
            noise = 2 / samples
            total -= math.log(p[0] / (p[0] + noise + 1e-7))
            total -= sum(math.log(noise / (other + noise + 1e-7)) for other in p[1:])
    found = crd_loss(student, teacher, ours, theirs, contrast, constants)
    assert found.item() == pytest.approx(total / 2, rel=1e-12)
    scores = [math.exp(torch.dot(student[i], theirs[j]).item() / 0.07) for i in range(2) for j in contrast[i]]
    z = crd_constants(student, teacher, ours, theirs, contrast)
    assert z[0].item() == pytest.approx(sum(scores) / 6 * samples, rel=1e-12)


def test_bank_moves_towards_the_embedding_and_keeps_length_1():
    bank, unit = units(5, 4), units(2, 4)
    after = crd_memory(bank, unit, torch.tensor([3, 1]), momentum=0.5)
    for row, one in ((3, unit[0]), (1, unit[1])):
        moved = (bank[row] + one) / 2
        assert torch.allclose(after[row], moved / moved.norm())
    assert torch.equal(after[[0, 2, 4]], bank[[0, 2, 4]])


def test_negatives_are_of_other_classes_and_differ():
    for method in (built()[0], built(negatives=3)[0]):  # by sorting keys, and by drawing more than needed
        drawn = method.draw(torch.arange(30))
        assert torch.equal(drawn[:, 0], torch.arange(30))
        assert (LABELS[drawn[:, 1:]] != LABELS[drawn[:, :1]]).all()
        assert all(len(set(row.tolist())) == len(row) for row in drawn)
        assert not torch.equal(method.draw(torch.arange(30)), drawn)


@pytest.mark.parametrize("k", [2, 15])  # sparse, dense
def test_every_other_sample_is_equally_likely(k):
    labels = torch.tensor([0] * 5 + [1] * 9 + [2] * 11)
    table = ClassSampler(labels)
    drawn = table.draw_other(torch.full((4000,), 1), k)
    share = drawn.flatten().bincount(minlength=25) / 4000
    assert share[5:14].eq(0).all()
    others = torch.cat([share[:5], share[14:]])
    # 16 others: each comes with probability k / 16; 5 standard deviations of 4000 draws
    assert (others - k / 16).abs().max() < 5 * math.sqrt(k / 16 * (1 - k / 16) / 4000)


def test_too_few_others_come_several_times():
    table = ClassSampler(torch.tensor([0, 0, 0, 1, 1]))
    drawn = table.draw_other(torch.tensor([0, 1]), 3)  # class 0 has 2 others, class 1 has 3
    assert set(drawn[0].tolist()) <= {3, 4}
    assert sorted(drawn[1].tolist()) == [0, 1, 2]
    assert table.draw_other(torch.tensor([0, 1]), 20).shape == (2, 20)


def test_relaxed_positive_is_any_image_of_the_class():
    method = built(positive="relax")[0]
    drawn = torch.cat([method.draw(torch.arange(30))[:, 0] for _ in range(20)])
    own = torch.arange(30).repeat(20)
    assert torch.equal(LABELS[drawn], LABELS[own])
    assert 0.02 < (drawn == own).double().mean() < 0.2  # 1 in 10


def test_step_sets_the_constants_once_and_moves_both_banks():
    method, student, teacher = built()
    banks = method.student_memory, method.teacher_memory
    terms = method.distill(student, teacher, made_batch())
    constants = method.constants
    assert (constants > 0).all()
    terms["contrast"].backward()  # reads the old banks
    for layer in (method.embed_student, method.embed_teacher):
        assert layer.weight.grad.norm() > 0
    for old, new in zip(banks, (method.student_memory, method.teacher_memory), strict=True):
        assert not new.requires_grad
        assert torch.equal(old[6:], new[6:])
        assert (old[:6] != new[:6]).all()
        assert torch.allclose(new[:6].norm(dim=1), torch.ones(6))
    method.distill(student, teacher, made_batch())
    assert torch.equal(method.constants, constants)


def test_a_step_compares_with_the_banks_as_they_were_before_it():
    method, student, teacher = built(momentum=0.9)
    banks = [bank.clone() for bank in (method.student_memory, method.teacher_memory)]
    batch = made_batch()
    torch.manual_seed(5)
    found = method.distill(student, teacher, batch)["contrast"]
    torch.manual_seed(5)
    contrast = method.draw(batch.index)
    embedded = [
        F.normalize(layer(outputs.embedding), dim=1)
        for layer, outputs in ((method.embed_student, student), (method.embed_teacher, teacher))
    ]
    wanted = crd_loss(*embedded, *banks, contrast, crd_constants(*embedded, *banks, contrast))
    assert found.item() == pytest.approx(0.8 * wanted.item(), rel=1e-6)
    for old, unit, new in zip(banks, embedded, (method.student_memory, method.teacher_memory), strict=True):
        moved = 0.9 * old[:6] + 0.1 * unit  # momentum is the share of the old row
        torch.testing.assert_close(new[:6], moved / moved.norm(dim=1, keepdim=True))


def test_banks_and_constants_survive_a_checkpoint():
    method, student, teacher = built()
    method.distill(student, teacher, made_batch())
    resumed, _, _ = built()
    resumed.load_state_dict(method.state_dict())
    found = []
    for one in (method, resumed):
        torch.manual_seed(3)
        found.append(one.distill(student, teacher, made_batch())["contrast"])
    assert torch.equal(*found)
    assert torch.equal(resumed.teacher_memory, method.teacher_memory)


def test_refusals():
    method, student, teacher = built()
    batch = made_batch()
    batch.index = None
    with pytest.raises(UsageError, match="pass index="):
        method.distill(student, teacher, batch)
    with pytest.raises(UsageError, match="labels of all its images"):
        built(labels=None)
    with pytest.raises(UsageError, match="2 classes or more, got 1"):
        built(labels=torch.zeros(5, dtype=torch.int64))
