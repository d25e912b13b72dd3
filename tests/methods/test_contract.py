"""What every method promises.  A line in METHODS brings a new method under all of these."""

import copy
import inspect

import pytest
import torch
from torch import nn

from potstill.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods import METHODS, create_method, list_methods, method_class
from potstill.methods.catalog import REQUIRED, check_method, entry, options
from potstill.options import OPTION_TYPES

OPTIONS = {"fitnet": {"student_layer": "stage2", "teacher_layer": "stage2"}}  # for methods without defaults
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS, INDEX = torch.arange(8), torch.arange(8)


class Net(nn.Module):
    """Two stages with BatchNorm, dropout and a head: enough for a method to go wrong on."""

    def __init__(self, width: int, classes: int = 8) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images):
        return self.head(self.dropout(self.stage2(self.stage1(images)).mean(dim=(2, 3))))


def make(name: str) -> Distiller:
    torch.manual_seed(0)
    return Distiller(Net(4), Net(8), create_method(name, **OPTIONS.get(name, {})), example=IMAGES)


def step(distiller: Distiller):
    return distiller(IMAGES, LABELS, index=INDEX, view=torch.zeros(8, dtype=torch.int64))


each_method = pytest.mark.parametrize("name", list_methods())


@each_method
def test_terms_are_named_finite_scalars_that_sum_to_the_loss(name):
    result = step(make(name))
    assert result.terms
    for key, term in result.terms.items():
        assert key.isidentifier()
        assert term.shape == ()
        assert term.isfinite()
        assert term.dtype == torch.float32
    assert result.loss.item() == pytest.approx(sum(term.item() for term in result.terms.values()), rel=1e-6)


@each_method
def test_gradient_reaches_every_trained_parameter(name):
    distiller = make(name)
    step(distiller).loss.backward()
    without = [key for key, p in distiller.trained_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@each_method
def test_an_optimizer_step_moves_student_and_adapters(name):
    distiller = make(name)
    before = {key: p.detach().clone() for key, p in distiller.trained_parameters()}
    optimizer = torch.optim.SGD([p for _, p in distiller.trained_parameters()], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        step(distiller).loss.backward()
        optimizer.step()
    still = [key for key, p in distiller.trained_parameters() if torch.equal(p, before[key])]
    # A bias in front of BatchNorm has no effect, so it may stand still.
    assert [key for key in still if not key.endswith("conv.bias")] == []


@each_method
def test_leaves_the_teacher_as_it_was(name):
    teacher = Net(8)
    distiller = Distiller(Net(4), teacher, create_method(name, **OPTIONS.get(name, {})), example=IMAGES)
    if not distiller.method.needs_teacher:
        assert distiller.teacher is None
        return
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    assert not any(module.training for module in teacher.modules())
    for switch in (distiller.train, teacher.train):  # also behind the Distiller's back
        switch()
        step(distiller).loss.backward()
        assert not teacher.training
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@each_method
def test_student_is_in_train_mode_after_an_evaluation(name):
    distiller = make(name)
    distiller.eval()
    step(distiller)
    distiller.train()
    assert all(module.training for module in distiller.student.modules())


@each_method
def test_state_dict_holds_no_teacher_and_can_be_loaded(name):
    distiller = make(name)
    state = distiller.state_dict()
    assert state
    assert not any(key.startswith("teacher.") for key in state)
    torch.manual_seed(1)
    other = Distiller(Net(4), Net(8), create_method(name, **OPTIONS.get(name, {})), example=IMAGES)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    outer = nn.ModuleDict({"inner": other})
    outer.load_state_dict(outer.state_dict())  # also where the Distiller is a part of something larger


@each_method
def test_can_be_copied_and_leaves_no_hooks(name):
    distiller = make(name)
    copied = copy.deepcopy(distiller).eval()
    distiller.eval()
    step(distiller)
    torch.testing.assert_close(step(copied).loss, step(distiller).loss, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in distiller.student.modules())
    if distiller.teacher is not None:
        assert not any(module._forward_hooks for module in distiller.teacher.modules())


@each_method
def test_building_leaves_no_trace_in_the_networks(name):
    torch.manual_seed(0)
    student = Net(4)
    before = copy.deepcopy(student.state_dict())
    Distiller(student, Net(8), create_method(name, **OPTIONS.get(name, {})), example=IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@each_method
def test_refuses_wrong_shapes(name):
    distiller = make(name)
    with pytest.raises(UsageError, match=r"labels must be int64 \[8\]"):
        distiller(IMAGES, LABELS.float())
    with pytest.raises(UsageError, match=r"labels must be int64 \[8\]"):
        distiller(IMAGES, LABELS[:4])
    if distiller.teacher is not None:
        mixed = Distiller(Net(4), Net(8, classes=9), create_method(name, **OPTIONS.get(name, {})), example=IMAGES)
        with pytest.raises(UsageError, match="teacher and student disagree"):
            step(mixed)


@each_method
def test_works_under_bf16_autocast(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = step(make(name))
    assert all(term.dtype == torch.float32 for term in result.terms.values())


class Doubled(nn.Module):
    """A label loss that cannot be mistaken for plain cross-entropy."""

    def forward(self, logits, labels):
        return 2 * nn.functional.cross_entropy(logits, labels)


@each_method
def test_label_loss_can_be_replaced(name):
    torch.manual_seed(0)
    method = create_method(name, **OPTIONS.get(name, {}))
    distiller = Distiller(Net(4), Net(8), method, example=IMAGES, label_loss=Doubled()).eval()
    replaced, plain = step(distiller).terms, step(make(name).eval()).terms
    assert replaced["ce"].item() == pytest.approx(2 * plain["ce"].item(), rel=1e-6)
    assert all(torch.equal(replaced[term], plain[term]) for term in plain if term != "ce")


@each_method
def test_is_documented_and_takes_keywords_only(name):
    known = entry(name)
    assert known.summary
    assert known.doc
    assert method_class(name).__doc__
    signature = inspect.signature(method_class(name))
    assert all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())


@each_method
def test_catalog_read_from_source_equals_the_signature(name):
    signature = inspect.signature(method_class(name))
    assert list(options(name)) == list(signature.parameters)
    for key, option in options(name).items():
        default = signature.parameters[key].default
        assert option.default == (REQUIRED if default is inspect.Parameter.empty else default)


@each_method
def test_ranges_are_checked_by_class_and_catalog_alike(name):
    for key, option in options(name).items():
        if option.annotation in OPTION_TYPES:
            given = OPTIONS.get(name, {}) | {key: -1}
            assert [problem.option for problem in check_method(name, given)] == [key]
            with pytest.raises(UsageError, match=f"{key} must be"):
                method_class(name)(**given)


def test_unknown_names_come_with_the_nearest_known_one():
    with pytest.raises(UsageError, match="no method 'kdd'; did you mean 'kd'"):
        create_method("kdd")
    with pytest.raises(UsageError, match="no option 'temprature'; did you mean 'temperature'"):
        create_method("kd", temprature=3)
    with pytest.raises(UsageError, match="student_layer must be given"):
        create_method("fitnet")


def test_every_line_in_methods_is_a_method():
    assert all(method_class(name).__mro__[1].__name__ == "Method" for name in METHODS)
