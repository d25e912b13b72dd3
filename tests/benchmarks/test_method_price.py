"""The benchmark that measures methods' prices, on networks that take a second."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from potstill import methods as registry
from potstill.methods import measured_costs, method_info, step_costs

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "method_price.py"
NETWORKS = [
    "--teacher",
    "cifar/resnet14",
    "--student",
    "cifar/resnet8",
    "--batch",
    "4",
    "--size",
    "16",
    "--classes",
    "5",
]


@pytest.fixture
def benchmark(monkeypatch):
    """Runs the script; returns its exit code."""
    spec = importlib.util.spec_from_file_location("method_price", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["method_price.py", *NETWORKS, "--rounds", "2", *map(str, arguments)])
        return script.main()

    return run


def test_prices_of_methods(benchmark, tmp_path, monkeypatch):
    output = tmp_path / "price.json"
    assert benchmark("kd", "crd", "deit_hard", "--output", output) == 0
    found = json.loads(output.read_text())
    assert (found["teacher"], found["batch"], found["rounds"]) == ("cifar/resnet14", 4, 2)
    assert set(found["machine"]) == {"processor", "threads", "torch"}
    assert found["plain"]["seconds"] > 0
    assert 0.05 < found["plain"]["mebibytes"] < 50
    methods = found["methods"]
    assert list(methods) == ["crd", "deit_hard", "kd"]
    for entry_ in methods.values():
        assert 0 < entry_["teacher"] < entry_["time"]
        assert entry_["low"] <= entry_["time"] <= entry_["high"]
    # two linear layers from 64 to 128 with biases; a second head of 5 classes
    assert {name: methods[name]["adapters"] for name in methods} == {"kd": 0, "crd": 2 * 65 * 128, "deit_hard": 65 * 5}
    # 16,384 negatives of 128 numbers for each of 4 images, twice: more than the small network ever holds
    assert methods["crd"]["memory"] > 10 > methods["kd"]["memory"] > 0.9

    monkeypatch.setattr(registry, "COSTS_FILE", output)
    measured_costs.cache_clear()
    assert step_costs()["kd"].time == methods["kd"]["time"]
    measured_costs.cache_clear()


def test_on_another_machine_the_other_methods_keep_their_prices(benchmark, tmp_path, monkeypatch, capsys):
    output = tmp_path / "price.json"
    assert benchmark("kd", "--output", output) == 0
    elsewhere = json.loads(output.read_text())
    elsewhere["machine"] |= {"processor": "Another CPU"}
    output.write_text(json.dumps(elsewhere))
    assert benchmark("supervised", "--output", output) == 0
    found = json.loads(output.read_text())
    entry = found["methods"].pop("supervised")
    assert found == elsewhere
    assert entry["machine"]["processor"] != "Another CPU"
    monkeypatch.setattr(registry, "COSTS_FILE", output)
    measured_costs.cache_clear()
    assert step_costs()["supervised"].machine == entry["machine"]
    assert step_costs()["kd"].machine is None
    measured_costs.cache_clear()

    before = output.read_text()
    with pytest.raises(SystemExit):
        benchmark("kd", "--batch", "8", "--output", output)
    assert "batch 4 there, 8 here: give another --output" in capsys.readouterr().err
    assert output.read_text() == before


def test_only_the_named_are_measured_anew_and_failures_are_said(benchmark, tmp_path, monkeypatch, capsys):
    output = tmp_path / "price.json"
    assert benchmark("kd", "--output", output) == 0
    first = json.loads(output.read_text())
    assert benchmark("supervised", "--output", output) == 0
    second = json.loads(output.read_text())
    assert second["methods"]["kd"] == first["methods"]["kd"]
    assert second["plain"] == first["plain"]
    assert second["methods"]["supervised"]["teacher"] == 0
    assert benchmark("dkd", "--classes", "2", "--output", tmp_path / "two.json") == 1
    assert "dkd: " in capsys.readouterr().err
    assert "dkd" in method_info("dkd").name  # the method is there; two classes are what it refuses
