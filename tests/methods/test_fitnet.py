import pytest
import torch
from torch import nn

from potstill.adapters import ConvAdapter
from potstill.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods.fitnet import FitNet


@pytest.mark.parametrize(("student", "teacher"), [(8, 8), (16, 8), (4, 8), (11, 8), (12, 5)])
def test_adapter_reaches_the_teachers_shape(student, teacher):
    features = torch.randn(2, 3, student, student)
    assert ConvAdapter(features.shape, (2, 6, teacher, teacher))(features).shape == (2, 6, teacher, teacher)


def test_adapter_says_what_it_cannot_join():
    with pytest.raises(UsageError, match="no adapter from a 5 pixel map to a 8 pixel map"):
        ConvAdapter((2, 3, 5, 5), (2, 6, 8, 8))
    with pytest.raises(UsageError, match=r"joins feature maps \[B, C, H, W\]"):
        ConvAdapter((2, 3), (2, 6))


def test_needs_an_example_to_size_its_adapter():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="pass example=images"):
        Distiller(net, net, FitNet(student_layer="0", teacher_layer="0"))
