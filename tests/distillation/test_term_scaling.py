"""Bounding a teacher's terms by those of the labels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from potstill.config.recipe import load_recipe
from potstill.distillation.distiller import LOGIT_BOUND, MEASURED_STEPS, STEPS_BETWEEN, Distiller, TermScaling
from potstill.experiment.preflight import create_stage_method
from potstill.methods import check_method, create_method
from potstill.methods.base import Method
from potstill.models.factory import create_model
from potstill.types import UNLABELED, Batch


class Pair:
    """Two layers with one weight each: hidden = a * x, logits = b * hidden."""

    def __init__(self, a=1.0, b=1.0):
        self.a, self.b = (nn.Parameter(torch.tensor(each)) for each in (a, b))

    def terms(self, weight, x=1.0):
        hidden = self.a * x
        logits = (self.b * hidden).reshape(1, 1)
        # Gradients with respect to (a, b): 3 * (b x, a x) of the first, weight * (x, none) of the second.
        terms = {"ce": 3 * logits.sum(), "hint": weight * hidden}
        return terms, {"ce"}, logits, Batch(torch.zeros(1, 3, 2, 2), torch.tensor([0])), [self.a, self.b]


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
    scaling.start_epoch()  # too early to measure anew
    assert scaling(*pair.terms(6.0))["hint"].item() == pytest.approx(6.0 * 48 / 1680)
    for _ in range(STEPS_BETWEEN - 7):
        scaling(*pair.terms(6.0))
    scaling.start_epoch()
    assert scaling(*pair.terms(6.0))["hint"].item() == pytest.approx(6.0)


def test_nothing_is_scaled_without_a_term_on_logits_and_nothing_measured_in_evaluation():
    scaling = TermScaling()
    terms, *rest = Pair().terms(500.0)
    del terms["ce"]
    assert scaling(terms, *rest) == terms
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


def logit_pull(distiller, images, labels, **inputs):
    """Norms of the gradients of the terms with respect to the logits of the images that have a label."""
    step = distiller(images, labels, **inputs)
    known = labels != UNLABELED
    return {
        name: torch.autograd.grad(term, step.logits, retain_graph=True)[0][known].norm().item()
        for name, term in step.terms.items()
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_soft_targets_pull_at_the_logits_twice_as_much_as_the_labels_at_most(mixed):
    distiller, images, labels = made("dkd", warmup_epochs=0, beta=500.0, alpha=0.001, ce_weight=0.5)
    inputs = {"soft_labels": torch.softmax(torch.randn(6, 3), dim=1)} if mixed else {}
    found = logit_pull(distiller, images, labels, **inputs)
    logits = distiller(images, labels, **inputs).logits.detach().requires_grad_()  # of the next step: as all weights
    plain = F.cross_entropy(logits, inputs.get("soft_labels", labels))
    labels_alone = torch.autograd.grad(plain, logits)[0].norm().item()
    assert found["nckd"] == pytest.approx(LOGIT_BOUND * labels_alone, rel=1e-4)
    assert found["ce"] == pytest.approx(labels_alone / 2, rel=1e-4)
    assert set(distiller.scaling.factors) == {"tckd", "nckd"}
    assert distiller.scaling.factors["tckd"] == 1


def test_images_without_labels_do_not_count():
    distiller, images, labels = made("combined", methods=[{"name": "kd", "factor": 500.0}, {"name": "dist"}])
    labels = torch.where(torch.arange(6) < 3, labels, UNLABELED)
    found = logit_pull(distiller, images, labels)
    logits = distiller(images, labels).logits.detach().requires_grad_()
    labels_alone = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0].norm().item()
    assert found["kd"] == pytest.approx(LOGIT_BOUND * labels_alone, rel=1e-4)


def test_images_without_labels_alone_leave_the_term_as_it_is():
    distiller, images, labels = made("kd", temperature=1.0, alpha=0.0)
    plain, *_ = made("kd", "paper", temperature=1.0, alpha=0.0)
    unknown = torch.full_like(labels, UNLABELED)
    assert distiller(images, unknown).terms["kd"].item() == pytest.approx(plain(images, unknown).terms["kd"].item())


def test_each_of_combined_methods_is_bounded():
    methods = [{"name": "kd", "factor": 50.0}, {"name": "at", "weight": 1e7}, {"name": "fitnet", "weight": 1e-9}]
    distiller, images, labels = made("combined", methods=methods)
    plain, *_ = made("combined", "paper", methods=methods)
    with torch.no_grad():
        before = plain(images, labels).terms
    after = distiller(images, labels).terms
    assert set(distiller.scaling.factors) == {"kd", "attention", "hint"}
    ratio = {name: (after[name] / before[name]).item() for name in after}
    assert ratio["ce"] == ratio["hint"] == pytest.approx(1)
    assert ratio["kd"] < 0.5
    assert ratio["attention"] < 0.1


def test_a_term_on_hidden_layers_is_bounded_by_the_bounded_terms_on_logits():
    methods = [{"name": "kd", "factor": 50.0}, {"name": "at", "weight": 1e7}]
    distiller, images, labels = made("combined", methods=methods)
    step = distiller(images, labels)
    terms = {"logits": step.terms["ce"] + step.terms["kd"], "attention": step.terms["attention"]}
    found = pull(distiller, type(step)(step.logits, terms, frozenset()))
    assert found["attention"] == pytest.approx(found["logits"], rel=1e-4)


def test_the_state_is_in_the_distillers():
    distiller, images, labels = made("at")
    distiller(images, labels)
    other, *_ = made("at")
    other.load_state_dict(distiller.state_dict())
    assert other.scaling.factors == distiller.scaling.factors != {}
    for _ in range(STEPS_BETWEEN - 1):
        distiller(images, labels)
    distiller.start_epoch(1, 2)
    assert distiller.scaling.steps == 0


def test_recipes_bound_the_terms_unless_they_say_otherwise():
    cases = {
        '{"name": "at"}': "auto",
        '{"name": "at", "scaling": "paper"}': "paper",
        '{"name": "dkd", "preset": "cifar100/vgg13-vgg8"}': "paper",  # a training like the authors'
        '{"name": "kd", "temperature": 4.0, "alpha": 0.1}': "paper",  # both weights are the user's
        '{"name": "kd", "scaling": "auto"}': "auto",
    }
    for method, wanted in cases.items():
        assert create_stage_method(load_recipe("quickstart", [f"method={method}"])).scaling == wanted, method


def test_scaling_is_a_setting_of_the_outermost_method():
    assert Method.scaling == "paper"
    assert create_method("at").scaling == "paper"
    (problem,) = check_method("at", {"scaling": "atuo"})
    assert problem.message == "scaling must be one of paper, auto, got 'atuo'; did you mean 'auto'?"
    (problem,) = check_method("eskd", {"base_method": {"name": "at", "scaling": "auto"}})
    assert "belongs to the outermost method" in problem.message
