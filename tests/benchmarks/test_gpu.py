"""The GPU's benchmark runs on tiny input, without a GPU too, and prints what it promises."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(monkeypatch, capsys, *arguments):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", *arguments])
    assert module.main() == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("measure", "lines"),
    [
        ("distillation", ["(a) stored KD / plain, B=8", "live KD / plain, B=8", "(h) naive / stored KD, B=8"]),
        ("layouts", ["float32 / bf16, channels last, B=8"]),
        ("efficiency", ["best bf16 matrix product", "training, B=8", "answers, B=8"]),
        ("pipeline", ["(b) pipeline / resident, shifts, B=8", "random crops, B=8", "(j) metrics, share of an epoch"]),
    ],
)
def test_a_measure_prints_its_lines(monkeypatch, capsys, measure, lines):
    printed = run(monkeypatch, capsys, measure)
    for line in lines:
        assert line in printed


def test_after_its_time_it_says_what_it_left_out(monkeypatch, capsys):
    assert "not measured, for lack of time: layouts" in run(monkeypatch, capsys, "--minutes", "-1", "layouts")


def test_unknown_measures_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "speed")
    assert "no measure speed; there are distillation" in capsys.readouterr().err
