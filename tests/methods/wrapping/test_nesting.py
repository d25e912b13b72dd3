"""A schedule, an end of the teacher and the teachers' weights hold wherever they stand: in every nesting of methods."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods import create_method, list_methods, method_class
from potstill.methods.base import Method
from potstill.types import Step

Settings = dict[str, Any]
EPOCHS = 5
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])

WRAPPERS: dict[str, Callable[[Settings], Settings]] = {
    "combined": lambda inner: {"name": "combined", "methods": [{"name": "logit_mse"}, inner | {"factor": 2.0}]},
    "ls": lambda inner: {"name": "ls", "base_method": inner},
    "eskd": lambda inner: {"name": "eskd", "base_method": inner, "stop": 1.0},
}
# Of each leaf: one of its terms, and an option that moves it.
LEAVES = {"kd": ("kd", "temperature"), "rkd": ("distance", "distance_weight")}


def allowed(wrappers: tuple[str, ...], leaf: str) -> bool:
    """As documented: no combination within another; ls around logits only."""
    return wrappers.count("combined") < 2 and not (leaf == "rkd" and "ls" in wrappers)


NESTINGS = [
    (wrappers, leaf)
    for depth in range(4)
    for wrappers in itertools.product(WRAPPERS, repeat=depth)
    for leaf in LEAVES
    if allowed(wrappers, leaf)
]
each_nesting = pytest.mark.parametrize(
    ("wrappers", "leaf"), NESTINGS, ids=["-".join((*wrappers, leaf)) for wrappers, leaf in NESTINGS]
)
# Three wrappers around each other with two teachers alone: each pair of them is tried with one teacher, too.
each_nesting_and_teachers = pytest.mark.parametrize(
    ("wrappers", "leaf", "teachers"),
    [
        pytest.param(wrappers, leaf, teachers, id="-".join((*wrappers, leaf, str(teachers))))
        for wrappers, leaf in NESTINGS
        for teachers in ([2] if len(wrappers) == 3 else [1, 2])
    ],
)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(images).mean(dim=(2, 3)))


def nested(wrappers: tuple[str, ...], leaf: Settings) -> Settings:
    for name in reversed(wrappers):
        leaf = WRAPPERS[name](leaf)
    return leaf


def step(settings: Settings, teachers: int, epoch: int = 2, weights: list[float] | None = None) -> Step:
    """One step in train mode in an epoch, counted from 0, of ``EPOCHS``."""
    torch.manual_seed(0)
    student, several = Net(4), [Net(6), Net(10)]
    distiller = Distiller(
        student, several[:teachers], create_method(**settings), example=IMAGES, teacher_weights=weights
    )
    distiller.start_epoch(epoch, EPOCHS)
    return distiller(IMAGES, LABELS)


def terms(settings: Settings, teachers: int, epoch: int = 2, weights: list[float] | None = None) -> dict[str, float]:
    """Of a step, which is the same each time, so that each is made once."""
    key = repr((settings, teachers, epoch, weights))
    if key not in _known_terms:
        found = step(settings, teachers, epoch, weights).terms.items()
        _known_terms[key] = {name: term.item() for name, term in found}
    return _known_terms[key]


_known_terms: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"name": "deit_hard"}, "deit_hard"),
        ({"name": "kd", "schedule": {"temperature": {"shape": "linear", "start": 1}}}, "kd"),
        ({"name": "ls", "base_method": {"name": "kd"}}, "ls"),
        ({"name": "combined", "methods": [{"name": "kd"}, {"name": "crd"}]}, "kd + crd"),
    ],
)
def test_messages_name_a_method_as_recipes_do(settings, label):
    assert create_method(**settings).label == label
    assert type("Mine", (Method,), {})().label == "Mine"


def test_every_nesting_that_is_allowed_is_tried():
    assert len(NESTINGS) == 1 + 3 + 8 + 20 + 1 + 2 + 3 + 4


@each_nesting_and_teachers
def test_the_weight_of_a_term_follows_its_schedule(wrappers, leaf, teachers):
    """Linear from 1 to 0: 0.5 in the third epoch of five; once more by the schedule of the outermost method."""
    term, _ = LEAVES[leaf]
    schedule = {"schedule": {term: {"shape": "linear", "start": 1.0, "end": 0.0}}}
    plain = terms(nested(wrappers, {"name": leaf}), teachers)
    inside = terms(nested(wrappers, {"name": leaf} | schedule), teachers)
    outside = terms(nested(wrappers, {"name": leaf}) | schedule, teachers)
    assert plain[term] > 1e-6
    wanted = {name: (0.5 if name == term else 1.0) * value for name, value in plain.items()}
    assert inside == pytest.approx(wanted, rel=1e-5)
    assert outside == pytest.approx(wanted, rel=1e-5)
    if wrappers:
        both = terms(nested(wrappers, {"name": leaf} | schedule) | schedule, teachers)
        assert both == pytest.approx({**plain, term: 0.25 * plain[term]}, rel=1e-5)


@each_nesting_and_teachers
def test_an_option_follows_its_schedule(wrappers, leaf, teachers):
    term, option = LEAVES[leaf]
    schedule = {option: {"shape": "linear", "start": 4.0, "end": 8.0}}
    moved = terms(nested(wrappers, {"name": leaf, "schedule": schedule}), teachers)
    assert moved == pytest.approx(terms(nested(wrappers, {"name": leaf, option: 6.0}), teachers), rel=1e-5)
    assert moved[term] != pytest.approx(terms(nested(wrappers, {"name": leaf}), teachers)[term], rel=1e-3)


@each_nesting_and_teachers
def test_the_teacher_stops_at_its_end(wrappers, leaf, teachers):
    """In the third epoch of five: 0.4 of the epochs are over."""
    term, _ = LEAVES[leaf]
    settings = nested(wrappers, {"name": "eskd", "base_method": {"name": leaf}, "stop": 0.4})
    plain = terms(nested(wrappers, {"name": leaf}), teachers)
    assert terms(settings, teachers, epoch=1)[term] == pytest.approx(plain[term], rel=1e-5)
    stopped = terms(settings, teachers, epoch=2)
    assert term not in stopped
    assert "ce" in stopped
    if "combined" in wrappers:
        assert stopped["logit_mse"] == pytest.approx(plain["logit_mse"], rel=1e-5)


@each_nesting
def test_the_teachers_weights_count(wrappers, leaf):
    """At 1 and 0 the first teacher alone is left."""
    settings = nested(wrappers, {"name": leaf})
    alone, both = terms(settings, 1), terms(settings, 2)
    assert terms(settings, 2, weights=[1.0, 0.0]) == pytest.approx(alone, rel=1e-5)
    term, _ = LEAVES[leaf]
    assert both[term] != pytest.approx(alone[term], rel=1e-3)


def test_terms_of_feature_methods_are_weighted_means():
    first = terms({"name": "rkd"}, 1)["distance"]
    second = 2 * terms({"name": "rkd"}, 2)["distance"] - first  # of the plain mean
    found = terms({"name": "rkd"}, 2, weights=[3.0, 1.0])["distance"]
    assert found == pytest.approx(0.75 * first + 0.25 * second, rel=1e-4)


def test_a_method_that_weighs_teachers_itself_refuses_weights():
    assert terms({"name": "camkd", "feature_weight": 0.0}, 2, weights=[1.0, 1.0])
    with pytest.raises(UsageError, match=r"camkd weighs the teachers by itself.*leave teachers\.weights out"):
        terms({"name": "camkd", "feature_weight": 0.0}, 2, weights=[2.0, 1.0])
    with pytest.raises(UsageError, match="camkd weighs the teachers by itself"):
        terms(nested(("combined",), {"name": "camkd", "feature_weight": 0.0}), 2, weights=[2.0, 1.0])


@pytest.mark.parametrize("wrappers", [(), ("combined",), ("ls",), ("combined", "ls")])
def test_a_name_that_is_no_term_is_refused_at_the_first_step(wrappers):
    settings = nested(wrappers, {"name": "kd", "schedule": {"kdd": {"start": 0.5}}})
    with pytest.raises(UsageError, match=r"schedule of kd names 'kdd'.*did you mean 'kd'"):
        terms(settings, 1)


@pytest.mark.parametrize("outer", ["combined", "ls"])
def test_a_label_term_that_the_outer_method_replaces_cannot_be_scheduled(outer):
    with pytest.raises(UsageError, match="the label term is that of the outer method"):
        terms(nested((outer,), {"name": "dist", "schedule": {"ce": {"start": 0.5}}}), 1)
    for settings in ({"ce_weight": 0.5}, {"schedule": {"ce_weight": {"start": 0.5}}}):
        with pytest.raises(UsageError, match=f"ce_weight of dist has no effect inside {outer}"):
            create_method(**nested((outer,), {"name": "dist", **settings}))


def test_a_label_term_of_a_second_view_stays_the_methods_own():
    create_method(**nested(("combined",), {"name": "mlld", "ce_weight": 0.5}))


def test_standardised_logits_reach_combined_methods():
    """Around a combination of kd and logit_mse as around each of them."""
    both = terms(nested(("ls", "combined"), {"name": "kd"}), 1)
    assert both["kd"] == pytest.approx(2 * terms({"name": "ls", "base_method": {"name": "kd"}}, 1)["kd"], rel=1e-5)
    assert both["logit_mse"] == pytest.approx(
        terms({"name": "ls", "base_method": {"name": "logit_mse"}}, 1)["logit_mse"], rel=1e-5
    )


def test_methods_that_decide_over_labels_stay_out_of_combinations_when_wrapped():
    with pytest.raises(UsageError, match="decides over the label term itself"):
        create_method(**nested(("combined", "eskd"), {"name": "pskd"}))


def test_no_method_has_a_forward_of_its_own():
    """A method around another calls ``label_terms`` and ``distill``: what stands in ``forward`` would be lost."""
    assert [name for name in list_methods() if method_class(name).forward is not Method.forward] == []
