import math

import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.functional import kd_loss, srd_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.srd import SRD


def test_term_against_loops_through_projector_and_batch_statistics():
    student, teacher = made_outputs(), made_outputs(seed=1, width=8)
    method = SRD()
    method.build(side(student), side(teacher), TrainingInfo(3))
    terms = method.distill(student, teacher, made_batch())
    projected = student.embedding @ method.project.weight.T + method.project.bias

    def normed(rows):
        return (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + 1e-4).sqrt()

    ours, theirs = normed(projected).flatten().tolist(), normed(teacher.embedding).flatten().tolist()
    wanted = 2 * math.log(sum(abs(a - b) ** 4 for a, b in zip(ours, theirs, strict=True)))
    assert terms["embedding"].item() == pytest.approx(wanted, rel=1e-5)
    assert terms["kd"].item() == pytest.approx(kd_loss(student.logits, teacher.logits, temperature=1.0).item())
    terms["embedding"].backward()
    assert method.project.weight.grad.norm() > 0
    assert teacher.maps[0].grad is None
    assert [name for name, _ in method.named_parameters()] == ["project.weight", "project.bias"]


def test_equal_features_are_finite():
    both = torch.randn(3, 4, requires_grad=True)
    loss = srd_loss(both, both.detach().clone())
    loss.backward()
    assert loss.isfinite()
    assert both.grad.eq(0).all()
