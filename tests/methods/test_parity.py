"""Losses and gradients equal the authors' code, in float64, on every reference case."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.adapters import ConvAdapter
from potstill.functional import hint_loss, kd_loss

spec = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("conftest.py"))
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)


def double(array: np.ndarray, *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=grad)


def assert_relative(found: torch.Tensor, wanted: np.ndarray, tolerance: float, floor: float = 0.0) -> None:
    """Relative L2 distance; ``floor`` makes it absolute where the reference itself is 0 up to rounding."""
    wanted = double(wanted)
    distance = (found.detach() - wanted).norm()
    assert distance <= tolerance * max(wanted.norm().item(), floor), f"off by {distance / wanted.norm():.2e}"


@pytest.mark.parametrize(("method", "case"), golden.golden_cases("kd"))
def test_kd_loss_and_gradient(method, case):
    arrays = golden.golden_arrays(method, case)
    student = double(arrays["in"]["zs"], grad=True)
    teacher = double(arrays["in"]["zt"], grad=True)
    loss = kd_loss(student, teacher, temperature=case["hyperparameters"]["T"])
    loss.backward()
    equal = case["name"] == "edge_equal"  # the reference is 0 up to rounding
    assert_relative(loss, arrays["out"]["loss"], 1e-10, floor=1e-4 if equal else 0.0)
    assert_relative(student.grad, arrays["grad"]["zs"], 1e-8, floor=1e-4 if equal else 0.0)
    assert teacher.grad is None


@pytest.mark.parametrize(("method", "case"), golden.golden_cases("kd"))
def test_kd_in_float32(method, case):
    arrays = golden.golden_arrays(method, case)
    loss = kd_loss(
        torch.tensor(arrays["in"]["zs"]), torch.tensor(arrays["in"]["zt"]), temperature=case["hyperparameters"]["T"]
    )
    assert loss.dtype == torch.float32
    # At T = 20 the two log-softmaxes nearly cancel: the reference's own float32 run is 7e-6 off.
    assert loss.item() == pytest.approx(float(arrays["out"]["loss"]), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(("method", "case"), golden.golden_cases("fitnet"))
def test_hint_through_its_adapter(method, case):
    arrays = golden.golden_arrays(method, case)
    student, teacher = double(arrays["in"]["fs"], grad=True), double(arrays["in"]["ft"])
    adapter = ConvAdapter(student.shape, teacher.shape).double().train()
    with torch.no_grad():
        for ours, theirs in {"conv": "reg", "norm": "reg_bn"}.items():
            getattr(adapter, ours).weight.copy_(double(arrays["param"][f"{theirs}.weight"]))
            getattr(adapter, ours).bias.copy_(double(arrays["param"][f"{theirs}.bias"]))
    guided = adapter(student)
    loss = hint_loss(guided, teacher)
    loss.backward()
    assert_relative(guided, arrays["out"]["student_reg"], 1e-10)
    assert_relative(loss, arrays["out"]["loss"], 1e-10)
    assert_relative(student.grad, arrays["grad"]["fs"], 1e-8)
    largest = max(float(np.linalg.norm(value)) for value in arrays["gradparam"].values())
    for name, wanted in arrays["gradparam"].items():
        layer, part = name.split(".")
        found = getattr(getattr(adapter, {"reg": "conv", "reg_bn": "norm"}[layer]), part).grad
        # The gradient of a bias in front of BatchNorm is exactly 0, so rounding is all there is.
        assert_relative(found, wanted, 1e-8, floor=1e-3 * largest)
