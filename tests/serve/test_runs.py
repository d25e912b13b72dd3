"""Figures of runs: one that was really carried out, and folders that hold odd things."""

import json
import os
import socket
import time

import pytest

from potstill.cli import main
from potstill.io import write_checksummed_json
from potstill.serve import server
from potstill.serve.runs import list_runs, report, summary
from potstill.serve.server import _open_socket

from ..conftest import few_digits, short_runs

SMALL = ("teacher.model=cifar/resnet8", "teacher.training.epochs=1", "training.epochs=1", "data.size=8")


def test_a_finished_run_has_its_figures(tmp_path):
    settings = [text for each in SMALL for text in ("--set", each)]
    with short_runs(), few_digits():
        assert main(["run", "quickstart", "--output-dir", str(tmp_path), "--name", "done", *settings]) == 0
    results = json.loads((tmp_path / "done" / "results.json").read_text())
    found = summary("done", list_runs(tmp_path)["done"])
    assert found["state"] == "finished"
    assert {each["stage"]: each["test_top1"] for each in found["stages"]} == {
        name: results["stages"][name]["test"]["top1"] for name in ("teacher", "baseline", "distilled")
    }


def _made(folder, results=None, epochs=()):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("x")
    if results is not None:
        write_checksummed_json(folder / "results.json", {"schema": 1, **results})
    (folder / "baseline").mkdir()
    (folder / "baseline" / "metrics.jsonl").write_text("\n".join(epochs))
    return folder


ODD_RESULTS = (
    {"stages": ["a", "list"], "method": "kd", "created": 7, "comparison": []},
    {"stages": {"baseline": {"test": {"top1": "a lot"}}}, "method": {"name": ["x"]}, "created": None},
    {"stages": {"baseline": 3}, "comparison": {"verdict": {"not": "text"}}},
)


@pytest.mark.parametrize("results", ODD_RESULTS)
def test_a_run_with_odd_results_is_listed_beside_the_others(tmp_path, results):
    _made(tmp_path / "odd", results)
    _made(tmp_path / "good", {"stages": {"baseline": {"test": {"top1": 0.5}}}, "created": "2026", "method": {}})
    listed = {run: server.Run.model_validate(summary(run, folder)) for run, folder in list_runs(tmp_path).items()}
    assert listed["good"].stages[0].test_top1 == 0.5
    assert listed["odd"].state == "finished"
    assert listed["odd"].stages[0].test_top1 is None


def test_a_federated_run_is_finished_with_its_last_algorithm(tmp_path):
    folder = _made(tmp_path / "fed")
    options, done = {"algorithms": ["fedavg", "feddf", "../outside"]}, {"test": {"top1": 0.75}}
    for trained, state in (
        ({"fedavg": done}, "training"),
        ({"fedavg": done, "feddf": {"test": None}, "../outside": done}, "finished"),
    ):
        write_checksummed_json(folder / "federated.json", {"schema": 1, "options": options, "trained": trained})
        found = server.Run.model_validate(summary("fed", folder))
        assert found.state == state
        assert [(each.stage, each.test_top1) for each in found.stages] == [("fedavg", 0.75), ("feddf", None)]
    (folder / "federated.json").write_text('{"trained": []}')
    assert summary("fed", folder)["state"] == "damaged"


@pytest.mark.parametrize("name", ["sweep.json", "fit.json"])
def test_a_search_is_listed_with_its_report(tmp_path, name):
    folder = tmp_path / "search"
    trial = _made(folder / "trials" / "0000")
    write_checksummed_json(folder / name, {"schema": 1})
    _made(tmp_path / "run")
    assert list_runs(tmp_path).keys() == {"search", "run"}
    assert (summary("search", folder)["state"], report("search", folder)) == ("training", None)
    for each in (trial / "recipe.yaml", trial / "baseline" / "metrics.jsonl"):
        os.utime(each, (0, 0))
    assert server.Run.model_validate(summary("search", folder)).state == "stopped"
    (folder / "sweep.html").write_text("all trials")
    found = server.Run.model_validate(summary("search", folder))
    assert (found.state, found.report, found.stages) == ("finished", True, [])
    assert report("search", folder) == b"all trials"
    (folder / "sweep.html").unlink()
    (folder / "sweep.html").symlink_to(trial / "recipe.yaml")
    assert report("search", folder) is None


def test_a_run_whose_epochs_are_long_is_training_for_longer(tmp_path):
    record = '{"epoch": 1, "seconds": %s}'
    lines = [record % 1000, record % "NaN", "[" * 100_000, '{"epoch": 2, "sec']  # the last is just being written
    for name, epochs, state in (("long", lines, "training"), ("short", [record % 1], "stopped")):
        folder = _made(tmp_path / name, epochs=epochs)
        half_an_hour_ago = time.time() - 1800
        for path in (folder / "recipe.yaml", folder / "baseline" / "metrics.jsonl"):
            os.utime(path, (half_an_hour_ago, half_an_hour_ago))
        assert summary(name, folder)["state"] == state


def test_a_report_links_those_of_its_folds_and_of_shrink_as_they_are_served(tmp_path):
    folder = _made(tmp_path / "mine")
    (folder / "report.html").write_text('<a href="fold-1/report.html"> <a href="shrink/distilled/shrink.html">')
    _made(folder / "fold-1")
    for name, json_of in (("distilled", True), ("baseline", False)):  # shrink.json comes last
        (folder / "shrink" / name).mkdir(parents=True)
        (folder / "shrink" / name / "shrink.html").write_text("the smallest file")
        if json_of:
            write_checksummed_json(folder / "shrink" / name / "shrink.json", {"schema": 1})
    found = list_runs(tmp_path)
    assert found.keys() == {"mine", "mine.fold-1", "mine.shrink-distilled"}
    linked = b'<a href="../mine.fold-1/report"> <a href="../mine.shrink-distilled/report">'
    assert report("mine", folder) == linked
    shrunk = found["mine.shrink-distilled"]
    assert report("mine.shrink-distilled", shrunk) == b"the smallest file"
    assert server.Run.model_validate(summary("mine.shrink-distilled", shrunk)).state == "finished"


def test_a_run_that_vanishes_is_damaged_and_no_error(tmp_path):
    assert summary("gone", tmp_path / "gone")["state"] == "damaged"


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "report.html", "baseline/metrics.jsonl"])
def test_links_inside_a_run_are_not_followed(tmp_path, name):
    outside = tmp_path / "outside"
    good = '{"epoch": 1, "seconds": 1, "train": {"loss": 1}, "val": {"loss": 1}}'
    _made(outside, {"stages": {"baseline": {"test": {"top1": 0.5}}}}, [good])
    (outside / "report.html").write_text("secret")
    folder = _made(tmp_path / "runs" / "run", {"stages": {}}, [good])
    (folder / "report.html").write_text("own")
    (folder / name).unlink()
    (folder / name).symlink_to(outside / name)
    assert "run" in list_runs(tmp_path / "runs") or name == "recipe.yaml"
    assert report("made", folder) == (None if name == "report.html" else b"own")
    assert summary("run", folder)["state"] == ("training" if name == "results.json" else "finished")
    assert summary("run", folder)["stages"][0]["test_top1"] is None


def test_a_stage_folder_that_is_a_link_is_no_stage(tmp_path):
    other = _made(tmp_path / "other")
    folder = _made(tmp_path / "runs" / "run")
    (folder / "distilled").symlink_to(other / "baseline", target_is_directory=True)
    assert [each["stage"] for each in summary("run", folder)["stages"]] == ["baseline"]


def test_the_address_can_be_connected_to_before_it_is_printed():
    with _open_socket("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()[:2], timeout=5):
        pass  # refused, if it were only bound
