"""The GPU's benchmark runs on tiny input, without a GPU too, and prints what it promises."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def load(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    terminate = signal.getsignal(signal.SIGTERM)
    yield load(monkeypatch)
    signal.signal(signal.SIGTERM, terminate)


def run(gpu, monkeypatch, capsys, *arguments, ends=0):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", *arguments])
    assert gpu.main() == ends
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("measure", "lines"),
    [
        ("distillation", ["(a) stored KD / plain, B=8", "live KD / plain, B=8", "(h) naive / stored KD, B=8"]),
        (
            "layouts",
            [
                "float32 / bf16, channels last, B=8",
                "bf16, channels last, compiled",
                "time of a step that compiling saves",
            ],
        ),
        (
            "efficiency",
            ["best bf16 matrix product", "cifar/resnet14 at 40 px, training, B=8", "of nominal", "answers, B=8"],
        ),
        (
            "pipeline",
            [
                "(b) pipeline / resident, shifts, B=8",
                "random crops, B=8",
                "read ahead / resident",
                "(j) metrics, share",
            ],
        ),
    ],
)
def test_a_measure_prints_its_lines(gpu, monkeypatch, capsys, measure, lines):
    printed = run(gpu, monkeypatch, capsys, measure)
    for line in lines:
        assert line in printed


def test_after_its_time_it_says_what_it_left_out(gpu, monkeypatch, capsys):
    assert "not measured, for lack of time: layouts" in run(gpu, monkeypatch, capsys, "--minutes", "-1", "layouts")


def test_unknown_measures_are_refused(gpu, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, capsys, "speed")
    assert "no measure speed; there are distillation" in capsys.readouterr().err


def test_what_fails_or_is_late_costs_no_other_measure(gpu, monkeypatch, capsys):
    def broken(bench):
        bench.row("before", "1.00")
        raise RuntimeError("out of memory")

    def late(bench):
        bench.row("early", "2.00")
        bench.deadline = 0.0
        list(bench.each_batch())

    monkeypatch.setattr(gpu, "MEASURES", {"broken": broken, "late": late, "last": None})
    printed = run(gpu, monkeypatch, capsys, ends=1)
    assert "failed: broken: RuntimeError: out of memory" in printed
    assert "not measured, for lack of time: late, from B=8 on" in printed
    assert "not measured, for lack of time: last, not begun" in printed
    assert "before  1.00" in printed
    assert "early   2.00" in printed


@pytest.mark.own_process
def test_stopped_from_outside_it_prints_what_it_has(gpu, monkeypatch, capsys):
    def slow(bench):
        bench.row("first", "1.00")
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does

    monkeypatch.setattr(gpu, "MEASURES", {"slow": slow})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    with pytest.raises(SystemExit):
        gpu.main()
    printed = capsys.readouterr().out
    assert "first  1.00" in printed
    assert "not measured, for lack of time: slow, not finished" in printed


def test_turns_change_their_order(gpu, tmp_path):
    bench, order = gpu.Bench(True, 0.0, "cifar/resnet8", "cifar/resnet8", tmp_path), []
    seconds = bench.race({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacababc"
    assert [len(found) for found in seconds.values()] == [3, 3, 3]


def test_the_stored_student_reads_a_store_and_never_asks(gpu, tmp_path):
    bench = gpu.Bench(True, 0.0, "cifar/resnet8", "cifar/resnet8", tmp_path)
    way = gpu.Student(bench, 8, "stored")
    way.block()
    assert (way.recorded.counts.computed, way.recorded.counts.read) == (0, 8 * bench.steps)


def test_a_fresh_machine_needs_few_packages():
    """torch, torchvision and timm with what they need themselves, and the wheels that gpu.sh asks for."""
    blocked = [
        "typer",
        "rich",
        "sklearn",
        "scipy",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "optuna",
        "pandas",
    ]
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import benchmarks.gpu"
    source = SCRIPT.parents[1]
    paths = os.pathsep.join([str(source / "src"), str(source)])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
