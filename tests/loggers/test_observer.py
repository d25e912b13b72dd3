"""What trackers are told, and that whatever they do, a run neither waits for them nor ends because of them."""

import json
import sys
import threading

import pytest
import torch

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.loggers import LoggerSettings, check_loggers_installed
from potstill.loggers.observer import LoggingObserver, log_files, logging_observer
from potstill.loggers.process import LoggerProcess
from potstill.models.model_file import load_model

from .conftest import FAILS, HANGS, KEEPS

pytestmark = pytest.mark.filterwarnings("error")
BASE = {
    "name": "t",
    "data": {"source": "digits"},
    "teacher": {"model": "cifar/resnet8"},
    "student": {"model": "cifar/resnet8"},
}
TRACKIO = [LoggerSettings(name="trackio")]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("tensorboard", [("tensorboard", "potstill", None)]),
        (["wandb", {"name": "trackio", "project": "cats"}], [("wandb", "potstill", None), ("trackio", "cats", None)]),
        ({"name": "mlflow", "uri": "http://127.0.0.1:1"}, [("mlflow", "potstill", "http://127.0.0.1:1")]),
        (None, []),
    ],
)
def test_a_recipe_names_its_trackers_in_one_line(said, meant):
    found = load_recipe({**BASE, "tracker": said})
    assert [(each.name, each.project, each.uri) for each in found.tracker] == meant
    import yaml

    assert load_recipe(yaml.safe_load(dump_recipe(found))).tracker == found.tracker


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ({"name": "wandb", "uri": "http://x"}, "uri is for mlflow"),
        ({"name": "mlflow", "uri": "http://me:secret@host"}, "must carry no password"),
        (["trackio", "trackio"], "named twice"),
        ({"name": "mlflow", "project": "a/b"}, "letters, digits"),
        ({"name": "mlflow", "url": "http://x"}, "unknown key; did you mean 'uri'"),
    ],
)
def test_what_is_wrong_with_a_tracker_is_said_in_a_sentence(said, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_recipe({**BASE, "tracker": said})


def test_a_missing_package_is_an_error_before_anything_is_made(monkeypatch, recipe, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'potstill\[wandb,trackio\]'"):
        check_loggers_installed([LoggerSettings(name="wandb"), LoggerSettings(name="trackio")])
    monkeypatch.undo()
    monkeypatch.setattr("potstill.loggers._is_installed", lambda name: False)
    with pytest.raises(UsageError, match="tracker mlflow: the package is not installed"):
        pipeline.run(recipe(tracker="mlflow"), root=tmp_path / "runs")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_folder_of_figures_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)  # another test may have used the real one
    with pytest.raises(UsageError, match="not installed"):
        check_loggers_installed(TRACKIO)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("potstill.loggers._is_installed", lambda name: True)


def test_a_run_tells_every_epoch_and_the_figures_on_test(recipe, tmp_path, stand_in, installed, told):
    read = stand_in(KEEPS)
    path = pipeline.run(recipe(tracker="trackio"), root=tmp_path / "runs", observer=told)
    first, *messages, final, end = read()
    assert first["parameters"]["method.temperature"] == 2.0
    assert first["parameters"]["teacher.training.epochs"] == 3
    assert [(m["stage"], m["epoch"]) for m in messages] == [
        *(("teacher", n) for n in (1, 2, 3)), *(("baseline", n) for n in (1, 2)), *(("distilled", n) for n in (1, 2))
    ]  # fmt: skip
    for message in messages:
        lines = (path / message["stage"] / "metrics.jsonl").read_text().splitlines()
        line = json.loads(lines[message["epoch"] - 1])
        assert message["figures"]["val/top1"] == line["val"]["top1"]
        assert message["figures"]["train/loss"] == line["train"]["loss"]
        assert "best" not in message["figures"]
    assert "train/terms/kd" in messages[-1]["figures"]
    results = json.loads((path / "results.json").read_text())
    assert final["figures"]["distilled/test/top1"] == results["stages"]["distilled"]["test"]["top1"]
    assert final["figures"]["comparison/top1_gain"] == results["comparison"]["top1_gain"]
    assert final["verdict"] == results["comparison"]["verdict"]
    assert end == {"kind": "end", "finished": True}
    assert told.stages == ["teacher", "baseline", "distilled"]
    assert told.warnings == []


def test_an_interrupted_run_is_no_finished_one(tmp_path, stand_in, told):
    read = stand_in(KEEPS)
    with pytest.raises(KeyboardInterrupt), logging_observer(TRACKIO, tmp_path, {}, told):
        raise KeyboardInterrupt
    assert read()[-1] == {"kind": "end", "finished": False}


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    """The run that no tracker is told of."""
    return pipeline.run(recipe(**{"training.threads": "1"}), root=tmp_path_factory.mktemp("plain"), evaluate=False)


@pytest.mark.parametrize(("script", "why"), [(FAILS, "the server is gone"), (HANGS, "has not answered for 1 seconds")])
def test_a_tracker_that_fails_or_hangs_costs_one_warning_and_nothing_else(
    recipe, tmp_path, stand_in, installed, told, plain, script, why
):
    stand_in(script)
    path = pipeline.run(recipe(tracker="trackio", **{"training.threads": "1"}), root=tmp_path / "runs", observer=told)
    (warning,) = [each for each in told.warnings if "tracker" in each]
    assert why in warning
    assert "goes on without it" in warning
    ours, theirs = (load_model(run / "distilled").module.state_dict() for run in (plain, path))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_nobody_waits_for_a_tracker_that_does_not_read(told):
    sender = LoggerProcess("trackio", {}, [sys.executable, "-c", HANGS])
    done = threading.Event()

    def send():
        for _ in range(200):  # a pipe holds 64 kB
            sender.send({"kind": "epoch", "figures": {"x" * 1000: 1.0}})
        done.set()

    threading.Thread(target=send, daemon=True).start()
    assert done.wait(60)
    assert sender.problem is None
    assert "has not answered" in sender.close(wait=0.1)
    assert sender.close(wait=0.1) is None  # said once
    assert sender.process.poll() is not None


def test_a_program_that_cannot_be_started_is_a_warning(tmp_path, monkeypatch, told):
    def refuse(name, first):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("potstill.loggers.observer.LoggerProcess", refuse)
    with logging_observer(TRACKIO, tmp_path, {}, told) as beside:
        beside.stage("teacher", "")
    assert told.warnings == ["tracker trackio gets nothing of this run: Cannot allocate memory"]


def test_a_resumed_run_keeps_its_identity_and_may_change_its_trackers(recipe, tmp_path, stand_in, installed):
    read, root = stand_in(KEEPS), tmp_path / "runs"
    pipeline.run(recipe(tracker="trackio"), root=root, evaluate=False)
    before = read()
    pipeline.run(recipe(tracker="[wandb]"), root=root, resume=True)
    after = read()[len(before) :]
    assert (before[0]["settings"]["name"], after[0]["settings"]["name"]) == ("trackio", "wandb")
    assert before[0]["identity"] == after[0]["identity"]
    assert [m["kind"] for m in after[1:]] == ["final", "end"]  # all was trained


def test_the_report_goes_to_those_that_keep_files(tmp_path, stand_in, told):
    read, run = stand_in(KEEPS), tmp_path / "run"
    run.mkdir()
    log_files(run, told)  # nobody knows of this run
    with logging_observer([LoggerSettings(name="tensorboard"), *TRACKIO], run, {}, told):
        pass
    for name in ("report.html", "results.json", "recipe.yaml"):
        (run / name).write_text("x")
    before = len(read())
    log_files(run, told)
    first, files, end = read()[before:]
    assert first["settings"]["name"] == "trackio"
    assert files["paths"] == [str(run / name) for name in ("report.html", "results.json", "recipe.yaml")]
    assert end["finished"]
    with logging_observer([], run, {}, told):  # gone on with, and no tracker asked for
        pass
    before = len(read())
    log_files(run, told)
    assert len(read()) == before


def test_without_trackers_nothing_is_started(tmp_path, monkeypatch, told):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    with logging_observer([], tmp_path, {}, told) as beside:
        assert isinstance(beside, LoggingObserver)
        beside.epoch_end({"epoch": 1})
    assert list(tmp_path.iterdir()) == []
