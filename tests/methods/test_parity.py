"""Losses and gradients equal the authors' code on every reference case of ``golden`` (its README.md describes it).

A larger set is read as well where there is one: POTSTILL_GOLDEN names its folder.
``parity/<method>.py`` says how our code computes a case; this module compares.  A method without such a file fails.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from parity_case import OWN, Case, read_index
from torch import Tensor

CHECKS = Path(__file__).with_name("parity")
CASES: dict[str, list[dict[str, Any]]] = {}
for _method, _entry in read_index():
    CASES.setdefault(_method, []).append(_entry)
each_method = pytest.mark.parametrize("method", CASES)
# float32: where the reference's own float32 run differs more from its float64 run than a third of this, a check file
# says so.
FLOAT32 = {"loss": 3e-5, "grad": 3e-4}


def load_check(method: str) -> ModuleType:
    path = CHECKS / f"{method}.py"
    if not path.exists():
        pytest.fail(f"reference values of {method!r} are there, but {CHECKS.name}/{method}.py is not")
    spec = importlib.util.spec_from_file_location(f"parity_{method}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(name: str, found: Tensor, wanted: Tensor, relative: float, absolute: float) -> None:
    """Relative L2 distance over the entries where the reference is finite; ours must be finite everywhere."""
    found = found.detach().double().reshape(wanted.shape)
    assert found.isfinite().all(), f"{name} is not finite"
    known = wanted.isfinite()
    distance = (found - wanted)[known].norm().item()
    allowed = relative * wanted[known].norm().item() + absolute
    assert distance <= allowed, f"{name}: distance {distance:.3e}, allowed {allowed:.3e}"


def compare(case: Case, found: dict[str, Tensor], loss: float, grad: float, floor: float) -> None:
    out, paper = case.wanted("out"), case.wanted("paper")
    stable = "loss_stable" in paper and not out["loss"].isfinite()
    missing = out.keys() - found.keys()
    assert not missing, f"the check does not return {missing}"
    assert_close("loss", found["loss"], paper["loss_stable"] if stable else out["loss"], loss, floor)
    for name in out.keys() - {"loss"}:
        if out[name].isfinite().all():
            assert_close(name, found[name], out[name], max(loss, grad / 10), floor)
    differentiable = [tensor for tensor in case.inputs.values() if tensor.requires_grad]
    if differentiable:
        found["loss"].sum().backward()
    wanted = {name: case.inputs[name].grad for name in case.wanted("grad")}
    wanted |= {f"parameter {name}": case.parameters[name].grad for name in case.wanted("gradparam")}
    references = {**case.wanted("grad"), **{f"parameter {k}": v for k, v in case.wanted("gradparam").items()}}
    if stable:
        references = {name: paper[f"grad/{name}"] for name in references}
    finite = [value for value in references.values() if value.isfinite().all()]
    largest = max((value.norm().item() for value in finite), default=0.0)
    for name, reference in references.items():
        assert wanted[name] is not None, f"no gradient reaches {name}"
        # Gradients that are 0 by construction (a bias in front of BatchNorm) are rounding in the reference.
        assert_close(f"gradient of {name}", wanted[name], reference, grad, 1e-3 * grad * largest + floor)


@contextmanager
def named(entry: dict[str, Any]) -> Iterator[None]:
    """Whatever is wrong is of this case."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"case {entry['name']} of {entry['folder']}: {error}") from error


@each_method
def test_equals_the_authors_code_in_float64(method):
    check = load_check(method)
    for entry in CASES[method]:
        with named(entry):
            torch.manual_seed(0)
            case = Case(method, entry, torch.float64)
            compare(case, check.check(case), loss=1e-10, grad=1e-8, floor=1e-13)


@each_method
def test_equals_the_authors_code_in_float32(method):
    check = load_check(method)
    unstable = getattr(check, "UNSTABLE_IN_FLOAT32", lambda _: None)
    stable = [entry for entry in CASES[method] if not unstable(entry)]
    tolerance = FLOAT32 | getattr(check, "FLOAT32", {})
    for entry in stable:
        with named(entry):
            torch.manual_seed(0)
            case = Case(method, entry, torch.float32)
            found = check.check(case)
            assert found["loss"].dtype == torch.float32
            compare(case, found, loss=tolerance["loss"], grad=tolerance["grad"], floor=1e-6)
    if not stable:
        pytest.skip(f"no case is stable: {unstable(CASES[method][0])}")


def test_an_unknown_method_fails_and_is_not_skipped():
    with pytest.raises(pytest.fail.Exception, match="reference values of 'no_such_method'"):
        load_check("no_such_method")


def test_the_repository_has_cases_of_every_method_that_has_a_check():
    """Without pickles, and small enough for a repository."""
    index = json.loads((OWN / "index.json").read_text())
    known = {method["method"]: [case["name"] for case in method["cases"]] for method in index["methods"]}
    assert {path.stem for path in CHECKS.glob("*.py")} == known.keys() == {path.stem for path in OWN.glob("*.npz")}
    for method, names in known.items():
        with np.load(OWN / f"{method}.npz", allow_pickle=False) as file:
            assert {key.split("/")[0] for key in file.files} == set(names)
            assert all(f"{name}/out/loss" in file.files for name in names)
    sizes = [path.stat().st_size for path in OWN.iterdir()]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 1_500_000
