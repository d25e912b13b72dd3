"""Every method on feature maps joins networks of any shape, with gradients to all that is trained."""

import pytest
import torch
from made_maps import built, gradients, labelled, outputs
from torch import nn

from potstill.methods.ab import AB
from potstill.methods.afd import AFD
from potstill.methods.at import AT, at_loss
from potstill.methods.fitnet import FitNet
from potstill.methods.fsp import FSP, fsp_loss
from potstill.methods.ft import FT
from potstill.methods.mgd import MGD
from potstill.methods.nst import NST, nst_loss
from potstill.methods.ofd import OFD
from potstill.methods.reviewkd import ReviewKD
from potstill.methods.semckd import SemCKD
from potstill.methods.vid import VID
from potstill.methods.vitkd import ViTKD
from potstill.methods.wkd_f import WKDF

CNN = ((6, 14), (8, 7), (10, 4), (12, 2))
GRID = ((16, 14),) * 4
SMALL = ((5, 8), (7, 5), (9, 3), (11, 2))
TINY = ((4, 2), (6, 1), (8, 1), (8, 1))
KINDS = {kind.__name__: kind for kind in (AB, AFD, AT, FitNet, FT, MGD, NST, OFD, ReviewKD, SemCKD, VID, ViTKD, WKDF)}


def pairs(shapes, needs):
    """What the Distiller would show: all maps, or one of them."""
    return {"last": shapes[-1:], "middle": shapes[1:2]}.get(needs.maps, shapes)


def make(kind, student_shapes, teacher_shapes):
    method = kind()
    student = outputs(*pairs(student_shapes, method.needs), batch=4, embedding=6, grad=True)
    teacher = outputs(*pairs(teacher_shapes, method.needs), batch=4, embedding=7)
    norms = tuple(nn.BatchNorm2d(features.shape[1]) for features in teacher.maps)
    return built(method, student, teacher, norms=norms), student, teacher


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(CNN, GRID), (GRID, CNN), (CNN, SMALL), (SMALL, CNN), (TINY, CNN), (CNN, TINY)],
)
def test_joins_maps_of_any_size_and_channels(name, student, teacher):
    method, ours, theirs = make(KINDS[name], student, teacher)
    method.train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad] + [*ours.maps], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        terms = method(ours, theirs, labelled())
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        assert loss.isfinite()
        assert [key for key, grad in gradients(method).items() if grad is None or not grad.isfinite().all()] == []
        read = (ours.maps[0], ours.maps[1], ours.maps[-1]) if name == "ViTKD" else ours.maps
        assert all(features.grad is not None for features in read)
        optimizer.step()


@pytest.mark.parametrize("name", [*KINDS, "FSP"])
def test_gradient_stops_at_the_teacher(name):
    kind = KINDS.get(name, FSP)
    method, ours, theirs = make(kind, CNN, CNN)
    for features in (*theirs.maps, theirs.embedding):
        features.requires_grad_(True)
    loss = torch.stack(list(method.train()(ours, theirs, labelled()).values())).sum()
    loss.backward()
    assert all(features.grad is None for features in (*theirs.maps, theirs.embedding))


@pytest.mark.parametrize("name", [*KINDS, "FSP"])
def test_terms_stay_in_float32_under_autocast(name):
    method, ours, theirs = make(KINDS.get(name, FSP), CNN, CNN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.train()(ours, theirs, labelled())
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("name", [*KINDS, "FSP"])
def test_weight_scales_the_terms(name):
    kind = KINDS.get(name, FSP)
    weights = [key for key in kind.OPTIONS if key in ("weight", "mimic_weight", "generation_weight")]
    zero, ours, theirs = make(lambda: kind(**dict.fromkeys(weights, 0.0)), CNN, CNN)
    assert all(term == 0 for term in zero.distill(ours, theirs, labelled()).values())


@pytest.mark.parametrize("loss", [at_loss, fsp_loss, nst_loss])
def test_autocast_does_not_lower_the_precision_inside(loss):
    student, teacher = ([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)] for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher)
    torch.testing.assert_close(found, loss(student, teacher), rtol=1e-6, atol=0)


def test_autocast_does_not_lower_the_precision_of_similarities():
    student, teacher = outputs((4, 4), (6, 2)), outputs((5, 4), (7, 2))
    method = built(SemCKD(), student, teacher)
    seen = []
    method.calibration.queries[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method(student, teacher, labelled())
    flat = student.maps[0].flatten(1)
    torch.testing.assert_close(seen[0], flat @ flat.T, rtol=1e-6, atol=0)
