"""Int8's rounding in training: ONNX's arithmetic, plain gradients, and a network that is as it was afterwards."""

import numpy as np
import pytest
import torch
from torch import nn

from potstill.config.recipe import load_recipe
from potstill.errors import UsageError
from potstill.training.settings import TrainingSettings
from potstill.training.student_forward import fake_quantize_input, fake_quantize_weight, simulated_int8

from .test_trainer import lines, train


def quantized_and_back(values, scale, zero):
    """QuantizeLinear and DequantizeLinear, as the ONNX standard words them: halves go to the even number."""
    steps = np.clip(np.rint(values / scale) + zero, -128, 127)
    return (steps - zero) * scale


def test_inputs_are_rounded_as_onnx_does():
    values = torch.randn(4, 3, 5, 5) * 3 + 1
    low, high = float(values.min()), float(values.max())
    scale = np.float32((high - low) / 255)
    expected = quantized_and_back(values.numpy(), scale, -128 - np.rint(low / scale))
    np.testing.assert_allclose(fake_quantize_input(values).numpy(), expected, atol=1e-6)
    positive = values.abs() + 1  # of the range [0, high], as after ReLU: 0 is always among the steps
    scale = np.float32(float(positive.max()) / 255)
    expected = quantized_and_back(positive.numpy(), scale, -128)
    np.testing.assert_allclose(fake_quantize_input(positive).numpy(), expected, atol=1e-6)


def test_weights_are_rounded_by_output_channel():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([0.01, 1.0, 10.0, 0.0]).view(4, 1, 1, 1)
    scale = np.maximum(np.abs(weight.numpy()).max((1, 2, 3), keepdims=True) / 127, 1e-12)
    np.testing.assert_allclose(fake_quantize_weight(weight).numpy(), np.rint(weight.numpy() / scale) * scale, atol=1e-6)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def test_a_forward_pass_is_that_of_rounded_layers():
    made, images = network().eval(), torch.randn(5, 3, 4, 4)
    hidden = fake_quantize_input(images)
    for layer in made:
        if isinstance(layer, nn.Conv2d):
            hidden = nn.functional.conv2d(
                fake_quantize_input(hidden),
                fake_quantize_weight(layer.weight),
                layer.bias,
                padding=layer.padding,
                groups=layer.groups,
            )
        elif isinstance(layer, nn.Linear):
            hidden = nn.functional.linear(fake_quantize_input(hidden), fake_quantize_weight(layer.weight), layer.bias)
        else:
            hidden = layer(hidden)
    with simulated_int8(made):
        found = made(images)
    torch.testing.assert_close(found, hidden)
    assert (found - made(images)).abs().max() > 1e-5


def test_gradients_reach_the_weights_as_if_nothing_were_rounded():
    layer, image = nn.Linear(3, 2), torch.tensor([[0.0, 1.0, 255.0]])  # whole steps: the input stays as it is
    with simulated_int8(layer):
        layer(image).sum().backward()
    torch.testing.assert_close(layer.weight.grad, image.expand(2, 3))


def test_nothing_stays_behind():
    made, images = network().eval(), torch.randn(2, 3, 4, 4)
    before, names = made(images), list(made.state_dict())
    with simulated_int8(made):
        made(images)
        assert list(made.state_dict()) == names
        assert all("weight" not in vars(each) for each in made)
    with pytest.raises(RuntimeError), simulated_int8(made):
        made(torch.randn(2, 4, 4, 4))  # a forward pass that fails
    assert all("weight" not in vars(each) for each in made)
    assert torch.equal(made(images), before)


SETTINGS = TrainingSettings(epochs=4, optimizer="sgd", lr=0.05, schedule="step", milestones=[1], gamma=1e-6)


def test_the_last_epochs_are_trained_under_it_and_picked_from(tmp_path):
    train(tmp_path / "plain", SETTINGS.model_copy(update={"selection_metric": "nll"}))
    history, _ = train(tmp_path / "int8", SETTINGS.model_copy(update={"selection_metric": "nll", "qat_fraction": 0.5}))
    loss = [[each["train"]["loss"] for each in lines(tmp_path / name)] for name in ("plain", "int8")]
    assert loss[0][:2] == loss[1][:2]
    assert loss[0][2] != loss[1][2]
    val = [each["val"]["loss"] for each in lines(tmp_path / "int8")]
    assert history.best_epoch == 3 + int(val[3] < val[2])


def test_an_earlier_epoch_is_not_picked_even_if_it_is_better(tmp_path):
    rising = TrainingSettings(epochs=4, optimizer="sgd", lr=0.05, schedule="step", milestones=[1], gamma=1.0)
    worse = rising.model_copy(update={"selection_metric": "nll", "weight_decay": 5.0, "qat_fraction": 0.25})
    history, _ = train(tmp_path, worse)
    assert history.best_epoch == 4


@pytest.mark.parametrize("after", [1, 3])
def test_it_goes_on_exactly(tmp_path, after):
    settings = TrainingSettings(epochs=4, lr=0.05, checkpoint_seconds=0, qat_fraction=0.5)
    _, one = train(tmp_path / "whole", settings)
    train(tmp_path / "cut", settings, epochs_run=after)
    _, two = train(tmp_path / "cut", settings, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_it_is_for_students_alone():
    recipe = load_recipe("quickstart", ["training.qat_fraction=0.2"])
    assert recipe.stage_training("teacher").qat_fraction == 0
    assert {recipe.stage_training(name).qat_fraction for name in ("baseline", "distilled")} == {0.2}


def test_early_stopping_might_end_before_it():
    with pytest.raises(
        UsageError, match="early_stopping_patience may end the training before quantization-aware training begins"
    ):
        load_recipe("quickstart", ["training.qat_fraction=0.2", "training.early_stopping_patience=3"])
    load_recipe("quickstart", ["training.qat_fraction=1", "training.early_stopping_patience=3"])
    load_recipe("quickstart", ["training.qat_fraction=0.2", "teacher.training.early_stopping_patience=3"])
