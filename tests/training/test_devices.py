import pytest
import torch

from potstill.errors import UsageError
from potstill.training.devices import Compute, create_compute
from potstill.training.settings import TrainingSettings


def test_unknown_devices_are_refused():
    with pytest.raises(UsageError, match="'abacus' cannot be used"):
        create_compute(TrainingSettings(device="abacus"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_refused():
    with pytest.raises(UsageError, match="'cuda' cannot be used"):
        create_compute(TrainingSettings(device="cuda"))


def test_precision_is_what_was_asked_for():
    assert create_compute(TrainingSettings(device="cpu", precision="bf16")).bf16
    compute = create_compute(TrainingSettings(device="cpu", precision="float32"))
    with compute.autocast():
        assert (torch.zeros(2, 2) @ torch.zeros(2, 2)).dtype == torch.float32
    with create_compute(TrainingSettings(device="cpu", precision="bf16")).autocast():
        assert (torch.zeros(2, 2) @ torch.zeros(2, 2)).dtype == torch.bfloat16


def test_channels_last_is_the_layout_unless_asked_otherwise():
    for asked, layout in (("auto", torch.channels_last), (True, torch.channels_last), (False, torch.contiguous_format)):
        assert create_compute(TrainingSettings(device="cpu", channels_last=asked)).memory_format == layout


def test_words():
    assert str(Compute(torch.device("cpu"), bf16=True, channels_last=True)).endswith(", bf16")
    assert str(Compute(torch.device("cuda:1"), bf16=False, channels_last=True)) == "cuda:1, float32"
