import pytest
import torch
import torch.nn.functional as F
from made_outputs import made_batch, made_outputs, side

from potstill.functional import kd_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.srrl import SRRL, Connector


def built(**options):
    student, teacher = made_outputs(), made_outputs(seed=1, width=8, grad=False)
    method = SRRL(**options)
    method.build(side(student), side(teacher), TrainingInfo(3))
    return method, student, teacher


def test_the_teachers_head_reads_the_connected_embedding_with_its_bias():
    method, student, teacher = built(feature_weight=0, regression_weight=2, kd_weight=0)
    terms = method.distill(student, teacher, made_batch())
    weight = method.connector.conv.weight[:, :, 0, 0]
    raw = student.embedding @ weight.T
    normed = (raw - raw.mean(dim=0)) / (raw.var(dim=0, unbiased=False) + 1e-5).sqrt()
    connected = normed.clamp(min=0)
    logits = connected @ teacher.head.weight.T + teacher.head.bias
    assert terms["regression"].item() == pytest.approx(2 * (logits - teacher.logits).square().mean().item(), rel=1e-5)


def test_kd_comes_on_top_with_weight_1_and_temperature_4():
    method, student, teacher = built()
    terms = method(student, teacher, made_batch())
    assert terms.keys() == {"ce", "feature", "regression", "kd"}
    wanted = kd_loss(student.logits, teacher.logits, temperature=4.0)
    assert terms["kd"].item() == pytest.approx(wanted.item())


def test_forms_connect_before_or_after_pooling():
    # On maps of one place they are one and the same.
    connector, embedding = Connector(5, 8, pool=True).eval(), torch.randn(4, 5)
    pooled = Connector(5, 8, pool=False).eval()
    pooled.load_state_dict(connector.state_dict())
    assert torch.allclose(connector(embedding[:, :, None, None]), pooled(embedding))
    # On larger maps ReLU comes before the mean.
    maps = torch.randn(4, 5, 3, 3)
    each_place = F.relu(connector.norm(connector.conv(maps))).mean(dim=(2, 3))
    assert torch.equal(connector(maps), each_place)
    assert SRRL(form="map").needs.maps == "last"
    assert SRRL().needs.maps == "none"


@pytest.mark.parametrize("form", ["pooled", "map"])
def test_adapter_learns(form):
    method, student, teacher = built(form=form)
    terms = method.distill(student, teacher, made_batch())
    (terms["feature"] + terms["regression"]).backward()
    assert method.connector.conv.weight.grad.norm() > 0
    assert student.maps[0].grad.norm() > 0
