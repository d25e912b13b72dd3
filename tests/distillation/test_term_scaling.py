"""Bounding terms on hidden layers by those on logits."""

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import MEASURED_STEPS, Distiller, TermScaling
from potstill.methods import check_method, create_method
from potstill.methods.base import Method
from potstill.models.factory import create_model


class Pair:
    """Two layers with one weight each: hidden = a * x, logits = b * hidden."""

    def __init__(self, a=1.0, b=1.0):
        self.a, self.b = (nn.Parameter(torch.tensor(each)) for each in (a, b))

    def terms(self, weight, x=1.0):
        hidden = self.a * x
        logits = (self.b * hidden).reshape(1, 1)
        # Gradients with respect to (a, b): 3 * (b x, a x) of the first, weight * (x, none) of the second.
        return {"ce": 3 * logits.sum(), "hint": weight * hidden}, logits, [self.a, self.b]


@pytest.mark.parametrize(("weight", "factor"), [(30.0, 0.1), (3.0, 1.0), (0.1, 1.0), (0.0, 1.0)])
def test_a_term_pulls_at_the_weights_it_reaches_no_more_than_the_labels_do(weight, factor):
    scaling = TermScaling()
    given = Pair().terms(weight)
    found = scaling(*given)
    assert found["hint"].item() == pytest.approx(factor * weight)  # the label's gradient to b, a x = 1, does not count
    assert found["ce"] is given[0]["ce"]
    assert scaling.factors == {"hint": pytest.approx(factor)}


def test_the_factor_is_that_of_the_first_steps_of_each_epoch():
    scaling, pair, seen = TermScaling(), Pair(b=2.0), []
    for x in [1.0, 5.0, 1.0, 1.0, 7.0, 7.0]:
        terms, *rest = pair.terms(60.0, x)
        seen.append((scaling({**terms, "hint": x * terms["hint"]}, *rest)["hint"] / (x * terms["hint"])).item())
    # r = 3 * 2 x, g = 60 x^2: sums 6 of 60; 36 of 1560; 42 of 1620; 48 of 1680, which stays
    assert seen == pytest.approx([0.1, 36 / 1560, 42 / 1620, 48 / 1680, 48 / 1680, 48 / 1680])
    assert MEASURED_STEPS == 4
    scaling.start_epoch()
    assert scaling(*pair.terms(6.0))["hint"].item() == pytest.approx(6.0)


def test_nothing_is_scaled_without_a_term_on_logits_and_nothing_measured_in_evaluation():
    scaling = TermScaling()
    terms, logits, parameters = Pair().terms(500.0)
    del terms["ce"]
    assert scaling(terms, logits, parameters) == terms
    assert scaling.factors == {}
    scaling = TermScaling().eval()
    assert scaling(*Pair().terms(500.0))["hint"].item() == 500
    assert scaling.steps == 0


def test_a_copy_goes_on_with_the_state_of_the_first():
    first, pair = TermScaling(), Pair()
    for weight in (40.0, 50.0):
        first(*pair.terms(weight))
    second = TermScaling()
    second.load_state_dict(first.state_dict())
    for weight in (60.0, 70.0, 80.0):
        assert torch.equal(first(*pair.terms(weight))["hint"], second(*pair.terms(weight))["hint"])
    assert first.factors == second.factors


def made(name, scaling="auto", **options):
    torch.manual_seed(0)
    student, teacher = create_model("cifar/resnet8", 3, size=16), create_model("cifar/resnet14", 3, size=16)
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    method = create_method(name, scaling=scaling, **options)
    return Distiller(student, teacher, method, example=images), images, labels


def pull(distiller, step):
    """Norm of each term's gradient with respect to the weights that both terms reach."""
    gradients = {
        name: torch.autograd.grad(
            term, list(distiller.student.parameters()), retain_graph=True, allow_unused=True, materialize_grads=False
        )
        for name, term in step.terms.items()
    }
    common = [all(each is not None for each in column) for column in zip(*gradients.values(), strict=True)]
    return {
        name: torch.stack([g.norm() for g, both in zip(column, common, strict=True) if both]).norm().item()
        for name, column in gradients.items()
    }


@pytest.mark.parametrize(("name", "term"), [("at", "attention"), ("fitnet", "hint"), ("sp", "similarity")])
def test_a_distiller_bounds_a_methods_term(name, term):
    distiller, images, labels = made(name, weight=1e5)
    found = pull(distiller, distiller(images, labels))
    assert found[term] == pytest.approx(found["ce"], rel=1e-4)
    distiller, images, labels = made(name, "paper", weight=1e5)
    found = pull(distiller, distiller(images, labels))
    assert found[term] > 10 * found["ce"]


def test_each_of_combined_methods_is_bounded_and_soft_targets_are_not():
    methods = [{"name": "kd", "factor": 50.0}, {"name": "at", "weight": 1e7}, {"name": "fitnet", "weight": 1e-9}]
    distiller, images, labels = made("combined", methods=methods)
    plain, *_ = made("combined", "paper", methods=methods)
    with torch.no_grad():
        before = plain(images, labels).terms
    after = distiller(images, labels).terms
    assert set(distiller.scaling.factors) == {"attention", "hint"}
    ratio = {name: (after[name] / before[name]).item() for name in after}
    assert ratio["ce"] == ratio["kd"] == ratio["hint"] == pytest.approx(1)
    assert ratio["attention"] < 0.1


def test_methods_on_logits_are_as_they_were():
    distiller, *_ = made("kd")
    assert distiller.scaling is None
    assert not any("scaling" in key for key in distiller.state_dict())


def test_the_state_is_in_the_distillers():
    distiller, images, labels = made("at")
    distiller(images, labels)
    other, *_ = made("at")
    other.load_state_dict(distiller.state_dict())
    assert other.scaling.factors == distiller.scaling.factors != {}
    distiller.start_epoch(1, 2)
    assert distiller.scaling.steps == 0


def test_scaling_is_a_setting_of_the_outermost_method():
    assert Method.scaling == "paper"
    assert create_method("at").scaling == "paper"
    (problem,) = check_method("at", {"scaling": "atuo"})
    assert problem.message == "scaling must be one of paper, auto, got 'atuo'; did you mean 'auto'?"
    (problem,) = check_method("eskd", {"base_method": {"name": "at", "scaling": "auto"}})
    assert "belongs to the outermost method" in problem.message
