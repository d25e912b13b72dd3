import math

import pytest
import torch
from made_maps import built, labelled, outputs
from torch import nn

from potstill.errors import UsageError
from potstill.methods.ofd import OFD, ofd_loss, ofd_margin


def norm(weights, biases):
    made = nn.BatchNorm2d(len(weights))
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weights))
        made.bias.copy_(torch.tensor(biases))
    return made


def test_margin_is_the_mean_of_negative_values():
    values = 1.5 * torch.randn(2_000_000, dtype=torch.float64) + 0.7
    drawn = values[values < 0].mean().item()
    assert ofd_margin(norm([-1.5], [0.7])).item() == pytest.approx(drawn, rel=5e-3)  # the weight's sign is no matter


def test_margin_where_nearly_nothing_is_negative():
    assert ofd_margin(norm([2.0], [7.0])).item() == -6.0  # 3.5 deviations above 0: -3 s
    assert ofd_margin(norm([2.0], [6.0])).item() < -0.4  # 3 deviations: share 0.00135, the formula


def test_margin_of_a_channel_without_spread_is_finite():
    assert ofd_margin(norm([0.0, 0.0, 0.0], [-2.0, 0.0, 2.0])).flatten().tolist() == pytest.approx([-2.0, 0.0, 0.0])


def test_cases_of_the_partial_distance():
    margin = torch.full((1, 1, 1, 1), -1.0)
    cases = [  # student, teacher, wanted
        (2.0, 5.0, 9.0),  # active: always compared
        (7.0, 5.0, 4.0),
        (-3.0, -2.0, 0.0),  # both inactive, student below the margin: left alone
        (0.5, -2.0, 2.25),  # inactive, student above the margin: pulled to it
        (-0.4, -0.5, 0.01),  # inactive above the margin: the target is the teacher's own value
        (-0.6, -0.5, 0.0),
    ]
    for student, teacher, wanted in cases:
        pair = [[torch.full((1, 1, 1, 1), value)] for value in (student, teacher)]
        assert ofd_loss(*pair, [margin]).item() == pytest.approx(wanted, rel=1e-6), (student, teacher)


def test_shallow_layers_weigh_less_and_maps_are_summed():
    zero, one = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    margin = torch.full((1, 3, 1, 1), -1.0)
    assert ofd_loss([zero, zero, one], [one] * 3, [margin] * 3).item() == pytest.approx(12 * (1 / 4 + 1 / 2))


def test_margins_are_buffers():
    student, teacher = outputs((4, 4), (6, 2)), outputs((5, 4), (7, 2))
    norms = (nn.BatchNorm2d(5), nn.BatchNorm2d(7))
    method = built(OFD(), student, teacher, norms=norms)
    assert {"margin0", "margin1"} <= set(method.state_dict())
    assert method.margin0.shape == (1, 5, 1, 1)
    assert method.margin0[0, 0].item() == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-6)
    method(student, teacher, labelled())


@pytest.mark.parametrize("missing", [None, nn.BatchNorm2d(7, affine=False)])
def test_refuses_a_teacher_without_batchnorm(missing):
    student, teacher = outputs((4, 4), (6, 2)), outputs((5, 4), (7, 2))
    with pytest.raises(UsageError, match=r"stage 2 of 2 has none\. Use reviewkd"):
        built(OFD(), student, teacher, norms=(nn.BatchNorm2d(5), missing))
