"""What is said of a run that potstill has really carried out."""

import json

from potstill.cli.entry import main
from potstill.serve.runs import known_runs, progress

SMALL = ("teacher.model=cifar/resnet8", "teacher.training.epochs=1", "training.epochs=1", "data.size=8")


def test_a_finished_run_has_its_figures(tmp_path):
    settings = [text for each in SMALL for text in ("--set", each)]
    assert main(["run", "quickstart", "--root", str(tmp_path), "--name", "done", *settings]) == 0
    results = json.loads((tmp_path / "done" / "results.json").read_text())
    found = progress("done", known_runs(tmp_path)["done"])
    assert found["state"] == "finished"
    assert {each["stage"]: each["test_top1"] for each in found["stages"]} == {
        name: results["stages"][name]["test"]["top1"] for name in ("teacher", "baseline", "distilled")
    }
    assert found["verdict"] == results["comparison"]["verdict"]
