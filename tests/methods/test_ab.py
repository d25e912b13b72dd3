import pytest
import torch
from made_maps import built, labelled, outputs

from potstill.errors import UsageError
from potstill.methods.ab import AB, ab_loss, active_terms
from potstill.methods.fsp import FSP


def test_cases_of_the_hinge():
    cases = [  # student, teacher, wanted before the factor 0.003
        (0.5, -1.0, 2.25),
        (-0.5, 0.0, 0.25),  # 0 is not active
        (-1.5, -1.0, 0.0),
        (0.5, 0.1, 0.25),
        (-2.0, 3.0, 9.0),
        (1.5, 3.0, 0.0),  # beyond the margin
    ]
    for student, teacher, wanted in cases:
        pair = [[torch.full((1, 1, 1, 1), value)] for value in (student, teacher)]
        assert ab_loss(*pair).item() == pytest.approx(0.003 * wanted), (student, teacher)


def test_shallow_layers_weigh_less_and_maps_are_summed():
    zero, one = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    good = 2 * one
    assert ab_loss([zero, zero, good], [one] * 3).item() == pytest.approx(0.003 * 12 * (1 / 4 + 1 / 2))
    assert ab_loss([zero], [one], margin=2.0).item() == pytest.approx(0.003 * 12 * 4)


@pytest.mark.parametrize(("kind", "teachers"), [(AB, "boundaries"), (FSP, "flow")])
def test_teacher_first_and_labels_afterwards(kind, teachers):
    student, teacher = outputs((4, 4), (6, 2), grad=True), outputs((4, 4), (6, 2))
    method = built(kind(), student, teacher)
    for epoch, labels in ((0, False), (29, False), (30, True), (269, True)):
        method.start_epoch(epoch, 270)
        assert set(method(student, teacher, labelled())) == ({"ce"} if labels else {teachers})
    for options, epochs in (({"init_share": 0.0}, 270), ({}, 1)):
        method = built(kind(**options), student, teacher)
        method.start_epoch(0, epochs)
        assert len(method(student, teacher, labelled())) == 2  # no stages: both


def test_first_stage_never_takes_all_epochs():
    method = AB(init_share=1.0)
    method.start_epoch(9, 10)
    assert active_terms(1.0, method) == (False, True)


def test_asks_where_training_stands():
    student, teacher = outputs((4, 4)), outputs((4, 4))
    method = built(AB(), student, teacher)
    method.epoch = method.epochs = None
    with pytest.raises(UsageError, match=r"call distiller\.start_epoch"):
        method(student, teacher, labelled())


def test_equal_shapes_need_no_connector():
    method = built(AB(), outputs((4, 4), (6, 2)), outputs((4, 4), (7, 2)))
    assert [sum(p.numel() for p in join.parameters()) for join in method.connectors] == [0, 6 * 7 + 14]
