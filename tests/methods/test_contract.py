"""What every method promises.  A class with a name in the folder of methods comes under all of these."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods import check_method, create_method, list_own_methods, method_class, method_info
from potstill.methods.base import Method
from potstill.types import Batch

# Options for methods without defaults, and such that eight images are a training set.
OPTIONS = {
    "combined": {"methods": [{"name": "kd"}, {"name": "at", "factor": 2.0}]},
    "crd": {"negatives": 4},
}
EPOCHS = 40
B, K = 8, 5
IMAGES = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SECOND = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS, INDEX = torch.arange(B) % K, torch.arange(B)


def block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


class Net(nn.Module):
    """Three stages with BatchNorm, dropout and a head: enough for a method to go wrong on."""

    def __init__(self, width: int, classes: int = K) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3 = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images):
        maps = self.stage3(self.stage2(self.stage1(images)))
        return self.head(self.dropout(maps.mean(dim=(2, 3))))


class TwoHeads(Net):
    """A student with a distillation head, as DeiT's: its logits are the mean of both."""

    def __init__(self, width: int, classes: int = K) -> None:
        super().__init__(width, classes)
        self.head_dist = nn.Linear(4 * width, classes)

    def forward(self, images):
        embedding = self.stage3(self.stage2(self.stage1(images))).mean(dim=(2, 3))
        return (self.head(embedding) + self.head_dist(embedding)) / 2


STUDENTS = {name: TwoHeads for name in list_own_methods() if name.startswith("deit")}
SAME_WIDTH = {"fsp"}  # needs equal channels


class Two(nn.ModuleList):
    """Two teachers, for methods that need several."""


def networks(name: str, classes: int = K) -> tuple[nn.Module, nn.Module]:
    width = 4
    teacher = Net(width if name in SAME_WIDTH else 2 * width, classes)
    if create_method(name, **OPTIONS.get(name, {})).needs.members:
        teacher = Two([teacher, Net(3 * width, classes)])
    return STUDENTS.get(name, Net)(width), teacher


def make(
    name: str,
    *,
    seed: int = 0,
    label_loss: nn.Module | None = None,
    teacher: nn.Module | None = None,
    settings: dict[str, Any] | None = None,
) -> Distiller:
    torch.manual_seed(seed)
    student, made = networks(name)
    distiller = Distiller(
        student,
        listed(teacher if teacher is not None else made),
        create_method(name, **OPTIONS.get(name, {}), **(settings or {})),
        example=IMAGES,
        train_labels=LABELS,
        batch_size=B,
        label_loss=label_loss,
    )
    distiller.prepare(lambda: iter([Batch(IMAGES, LABELS, INDEX)]))
    distiller.start_epoch(0, EPOCHS)
    return distiller


def listed(teacher: nn.Module) -> nn.Module | list[nn.Module]:
    return list(teacher) if isinstance(teacher, Two) else teacher


def listed_always(teacher: nn.Module) -> list[nn.Module]:
    return list(teacher) if isinstance(teacher, Two) else [teacher]


def step(distiller: Distiller):
    return distiller(IMAGES, LABELS, index=INDEX, view=torch.zeros(B, dtype=torch.int64), second=SECOND)


def all_phases(distiller: Distiller):
    """Yield a step of the first epoch and one of the last: some methods train in two phases."""
    for epoch in (0, EPOCHS - 1):
        distiller.start_epoch(epoch, EPOCHS)
        yield step(distiller)


each_method = pytest.mark.parametrize("name", list_own_methods())


@each_method
def test_terms_come_and_go_only_where_the_method_says_so(name):
    """``staged``: a schedule that names no term is then looked for in the first and the last epoch together."""
    distiller = make(name)
    first, last = (list(result.terms) for result in all_phases(distiller))
    assert (first != last) == distiller.method.staged


@each_method
def test_options_that_a_schedule_may_move_count_at_every_step(name):
    """A method whose schedules give values is the method that was made with them."""
    defaults = {option: method_info(name).options[option].default for option in method_info(name).schedulable}
    values = {option: 0.6 * default if default else 0.3 for option, default in defaults.items()}
    schedule = {option: {"start": value} for option, value in values.items()}
    made, moved = (make(name, settings=settings) for settings in (values, {"schedule": schedule} if schedule else {}))
    for epoch in (0, EPOCHS - 1):
        found = []
        for distiller in (made, moved):
            torch.manual_seed(1)
            distiller.start_epoch(epoch, EPOCHS)
            found.append({key: term.item() for key, term in step(distiller).terms.items()})
        assert found[0] == found[1]


@each_method
def test_terms_are_named_finite_scalars_that_sum_to_the_loss(name):
    for result in all_phases(make(name)):
        assert result.terms
        for key, term in result.terms.items():
            assert key.isidentifier()
            assert term.shape == ()
            assert term.isfinite()
            assert term.dtype == torch.float32
        assert result.loss.item() == pytest.approx(sum(term.item() for term in result.terms.values()), rel=1e-5)
        labels, others = result.parts
        parts = sum(part.item() for part in (labels, others) if part is not None)
        assert parts == pytest.approx(result.loss.item(), rel=1e-5)


@each_method
def test_gradient_reaches_every_trained_parameter(name):
    distiller = make(name)
    for result in all_phases(distiller):
        result.loss.backward()
    without = [key for key, p in distiller.trained_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@each_method
def test_whatever_learns_is_among_the_trained_parameters(name):
    """A variance in a plain list, or an adapter that the optimizer never hears of, would stand still for ever."""
    distiller = make(name)
    trained = {id(p) for _, p in distiller.trained_parameters()}
    for result in all_phases(distiller):
        assert {id(leaf) for leaf in leaves(result.loss)} <= trained


def leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a backward pass leaves gradients in."""
    found, waiting, seen = [], [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


@each_method
def test_optimizer_steps_move_student_and_adapters(name):
    distiller = make(name)
    before = {key: p.detach().clone() for key, p in distiller.trained_parameters()}
    optimizer = torch.optim.SGD([p for _, p in distiller.trained_parameters()], lr=0.5)
    for _ in range(2):
        for result in all_phases(distiller):
            optimizer.zero_grad()
            result.loss.backward()
            nn.utils.clip_grad_norm_(before_parameters(distiller), 1.0)
            optimizer.step()
    still = [key for key, p in distiller.trained_parameters() if torch.equal(p, before[key])]
    # A bias in front of BatchNorm has no effect, so it may stand still.
    assert [key for key in still if not key.endswith("bias")] == []


def before_parameters(distiller: Distiller):
    return [p for _, p in distiller.trained_parameters()]


@each_method
def test_leaves_the_teacher_as_it_was(name):
    _, teacher = networks(name)
    distiller = make(name, teacher=teacher)
    if not distiller.method.needs.teacher:
        assert distiller.teacher is None
        return
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    assert not any(module.training for network in listed_always(teacher) for module in network.modules())
    assert distiller.teacher is not None
    for switch in (distiller.train, teacher.train):  # also behind the Distiller's back
        switch()
        step(distiller).loss.backward()
        assert not any(module.training for module in distiller.teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@each_method
def test_student_is_in_train_mode_after_an_evaluation(name):
    distiller = make(name)
    distiller.eval()
    step(distiller)
    distiller.train()
    trained = [module for module in distiller.student.modules() if any(p.requires_grad for p in module.parameters())]
    assert trained
    assert all(module.training for module in trained)


@each_method
def test_evaluation_leaves_no_trace(name):
    distiller = make(name)
    step(distiller)
    distiller.eval()
    before = copy.deepcopy(distiller.state_dict())
    step(distiller)
    assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())


@each_method
def test_state_dict_holds_no_teacher_and_can_be_loaded(name):
    distiller = make(name)
    step(distiller)  # memories are filled
    state = distiller.state_dict()
    assert state
    assert not any(key.startswith("teacher.") for key in state)
    other = make(name, seed=1)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    outer = nn.ModuleDict({"inner": other})
    outer.load_state_dict(outer.state_dict())  # also where the Distiller is a part of something larger


@each_method
def test_can_be_copied_and_leaves_no_hooks(name):
    distiller = make(name)
    copied = copy.deepcopy(distiller).eval()
    distiller.eval()
    torch.manual_seed(0)
    ours = step(distiller).loss
    torch.manual_seed(0)
    torch.testing.assert_close(step(copied).loss, ours, rtol=0, atol=0)
    for network in (distiller.student, distiller.teacher):
        if network is not None:
            hooked = [module for module in network.modules() if module._forward_hooks or module._forward_pre_hooks]
            assert hooked == []


@each_method
def test_building_leaves_no_trace_in_the_networks(name):
    torch.manual_seed(0)
    student, teacher = networks(name)
    before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    method = create_method(name, **OPTIONS.get(name, {}))
    Distiller(student, listed(teacher), method, example=IMAGES, train_labels=LABELS, batch_size=B)
    for network, state in zip((student, teacher), before, strict=True):
        after = network.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in state.items() if key in after)
        assert any(key in after for key in state)


@each_method
def test_refuses_wrong_shapes(name):
    distiller = make(name)
    with pytest.raises(UsageError, match=r"labels must be int64 \[8\]"):
        distiller(IMAGES, LABELS.float(), index=INDEX, second=SECOND)
    with pytest.raises(UsageError, match=r"labels must be int64 \[8\]"):
        distiller(IMAGES, LABELS[:4], index=INDEX, second=SECOND)
    if distiller.teacher is not None:
        with pytest.raises(UsageError, match=r"disagree|classes"):
            step(make(name, teacher=networks(name, classes=K + 1)[1]))


@each_method
def test_refuses_a_batch_that_lacks_what_it_needs(name):
    distiller = make(name)
    needs = distiller.method.needs
    given = {"index": INDEX, "second": SECOND}
    if needs.index:
        with pytest.raises(UsageError, match="index="):
            distiller(IMAGES, LABELS, **{**given, "index": None})
    if needs.second != "none":
        with pytest.raises(UsageError, match="second="):
            distiller(IMAGES, LABELS, **{**given, "second": None})
    if needs.several:
        with pytest.raises(UsageError, match="compares"):
            distiller(IMAGES[:1], LABELS[:1], index=INDEX[:1], second=SECOND[:1])
    if needs.labels:
        with pytest.raises(UsageError, match="label of every image"):
            distiller(IMAGES, torch.full_like(LABELS, -100), **given)
    if needs.epoch:
        forgetful = make(name)
        for module in forgetful.modules():
            if isinstance(module, Method):
                module.epoch = None
        with pytest.raises(UsageError, match="start_epoch"):
            step(forgetful)
    if needs.example:
        student, teacher = networks(name)
        with pytest.raises(UsageError, match="pass example="):
            Distiller(student, listed(teacher), create_method(name, **OPTIONS.get(name, {})))


@each_method
def test_works_under_bf16_autocast(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = step(make(name))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in result.terms.values())


class Doubled(nn.Module):
    """A label loss that cannot be mistaken for plain cross-entropy."""

    def forward(self, logits, labels):
        return 2 * nn.functional.cross_entropy(logits, labels)


@each_method
def test_label_loss_can_be_replaced(name):
    replaced, plain = (step(make(name, label_loss=loss).eval()).terms for loss in (Doubled(), None))
    if "ce" in plain:
        assert replaced["ce"].item() == pytest.approx(2 * plain["ce"].item(), rel=1e-6)


@each_method
def test_is_documented_and_takes_keywords_only(name):
    known = method_info(name)
    assert known.summary
    assert known.loss
    assert all(option.doc for option in known.options.values())
    signature = inspect.signature(method_class(name))
    assert all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())
    assert list(signature.parameters) == list(known.options)
    with pytest.raises(TypeError):
        method_class(name)(1.0)


@each_method
def test_defaults_and_presets_pass_their_own_checks(name):
    for preset in [None, *method_info(name).presets]:
        method = create_method(name, preset=preset, **OPTIONS.get(name, {}))
        assert isinstance(method, Method)


@each_method
def test_ranges_are_checked_by_class_and_catalog_alike(name):
    for key, option in method_info(name).options.items():
        if {"minimum", "exclusiveMinimum"} & set(option.schema):
            given = OPTIONS.get(name, {}) | {key: -1}
            assert [problem.option for problem in check_method(name, given)] == [key]
            with pytest.raises(UsageError, match=f"{key} must be"):
                method_class(name)(**given)


def test_unknown_names_come_with_the_nearest_known_one():
    with pytest.raises(UsageError, match="no method 'kdd'; did you mean 'kd'"):
        create_method("kdd")
    with pytest.raises(UsageError, match="no option 'temprature'; did you mean 'temperature'"):
        create_method("kd", temprature=3)
    with pytest.raises(UsageError, match="methods must be given"):
        create_method("combined")
    with pytest.raises(UsageError, match="no preset 'cifar10'; did you mean 'cifar100'"):
        create_method("kd", preset="cifar10")


def test_a_preset_gives_way_to_options():
    method = create_method("kd", preset="cifar100", alpha=0.3)
    assert (method.temperature, method.alpha) == (4.0, 0.3)
