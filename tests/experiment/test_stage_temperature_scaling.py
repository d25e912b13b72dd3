"""One temperature in the weights of a student's last layer."""

import json

import pytest
import torch
from torch import nn

from potstill.evaluation.final_metrics import calibration_report, fit_temperature
from potstill.experiment.stage import scale_logits
from potstill.input_spec import InputSpec
from potstill.models.model_file import Classifier
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute
from potstill.types import Batch

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)
CLASSES = 3


class Val:
    """Images whose pixels are the logits of another network, with labels drawn by its probabilities."""

    def __init__(self, count, scale=4.0):
        generator = torch.Generator().manual_seed(0)
        self.images = scale * torch.randn(count, 3, 1, 1, generator=generator)
        self.labels = torch.multinomial(self.images.flatten(1).softmax(1), 1, generator=generator).flatten()

    def epoch(self, number=0):
        for index in torch.arange(len(self.labels)).split(64):
            yield Batch(self.images[index], self.labels[index])


class Network(nn.Module):
    """Its logits are the pixels, times ``factor``."""

    def __init__(self, factor, tied=False):
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(factor * torch.eye(CLASSES))
            self.head.bias.copy_(factor * torch.tensor([0.1, 0.0, -0.1]))
        self.first = self.head if tied else nn.Identity()

    def forward(self, images):
        return self.head(self.first(images.flatten(1)))


def student(network):
    return Classifier(network, "code.py:Network", ("a", "b", "c"), InputSpec(1))


def divided(probabilities, temperature):
    """The probabilities of logits that are divided by the temperature."""
    return (torch.as_tensor(probabilities).double().log() / temperature).softmax(1).numpy()


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_too_flat_and_too_sharp_probabilities_are_calibrated_and_the_top_class_stays(factor):
    val, made = Val(600), student(Network(factor))
    before = made.predict(val.images)
    found, metrics = scale_logits(made, val, CPU, SilentObserver(), "distilled")
    after = made.predict(val.images)
    assert found["temperature"] == pytest.approx(factor, rel=0.25)  # the labels are those of factor 1
    assert found["temperature"] == pytest.approx(fit_temperature(before.double().numpy(), val.labels.numpy()), rel=1e-3)
    assert torch.equal(after.argmax(1), before.argmax(1))
    nll = nn.functional.nll_loss(after.log(), val.labels).item()
    assert nll == pytest.approx(found["after"]["nll"], rel=1e-4) == pytest.approx(metrics["nll"], rel=1e-4)
    assert found["after"]["nll"] < found["before"]["nll"] - 0.1
    assert found["after"]["ece"] < 0.05 < found["before"]["ece"]
    expected = divided(before, found["temperature"])
    torch.testing.assert_close(after.double(), torch.from_numpy(expected), rtol=0, atol=1e-4)
    json.dumps(found)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (Network(1.0), 600),  # calibrated already
        (Network(2.0), 8),  # too few images to know
        (Network(3.0, tied=True), 600),  # its last layer serves twice
    ],
)
def test_nothing_is_changed_where_it_does_not_help_beyond_doubt(network, count):
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert scale_logits(student(network), Val(count), CPU, SilentObserver(), "distilled") == ({}, {})
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_report_of_a_scaled_network_undoes_the_scaling_for_before():
    val = Val(300)
    raw = val.images.flatten(1).double().softmax(1).numpy()
    scaled = divided(raw, 2.0)
    plain = calibration_report(raw, val.labels.numpy(), raw, val.labels.numpy())
    found = calibration_report(scaled, val.labels.numpy(), scaled, val.labels.numpy(), applied=2.0)
    assert (found["temperature"], found["applied"], plain["applied"]) == (2.0, True, False)
    assert found["before"]["nll"] == pytest.approx(plain["before"]["nll"], rel=1e-6)
    assert found["before"]["ece"] == pytest.approx(plain["before"]["ece"], rel=1e-6)
    assert found["after"]["nll"] > found["before"]["nll"]  # 2 is the wrong temperature here
