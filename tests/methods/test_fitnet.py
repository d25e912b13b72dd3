import pytest
import torch
from made_maps import built, labelled, outputs
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.features import ConvAdapter
from potstill.methods.fitnet import FitNet


@pytest.mark.parametrize(("student", "teacher"), [(8, 8), (16, 8), (4, 8), (11, 8), (12, 5)])
def test_adapter_reaches_the_teachers_shape(student, teacher):
    features = torch.randn(2, 3, student, student)
    assert ConvAdapter(features.shape, (2, 6, teacher, teacher))(features).shape == (2, 6, teacher, teacher)


def test_compares_with_the_teachers_map_at_its_own_size():
    ours, theirs = outputs((3, 5)), outputs((6, 7))
    method = built(FitNet(), ours, theirs).train()
    adapted = method.adapter(ours.maps[0])
    assert adapted.shape == theirs.maps[0].shape
    wanted = 100 * ((adapted - theirs.maps[0]) ** 2).sum() / (4 * 6 * 7 * 7)
    torch.testing.assert_close(method(ours, theirs, labelled())["hint"], wanted)


def test_needs_an_example_to_size_its_adapter():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="pass example=images"):
        Distiller(net, net, FitNet())
