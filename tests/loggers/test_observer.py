"""What trackers receive, and that whatever they do, a run neither waits for them nor ends because of them."""

import json
import sys

import pytest
import torch

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.loggers import LoggerSettings, check_loggers_installed
from potstill.loggers.observer import LoggerThread, LoggingObserver, logging_observer
from potstill.models.model_file import load_model

from .conftest import Fails, Hangs, Keeps

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
        ({"name": "mlflow", "uri": "http://me:secret@host"}, "must contain no password"),
        (["trackio", "trackio"], "given twice"),
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
        pipeline.run(recipe(tracker="mlflow"), output_dir=tmp_path / "runs")
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


def test_a_run_logs_every_epoch_and_the_figures_on_test(recipe, tmp_path, stand_in, installed, told):
    calls = stand_in(Keeps)
    path = pipeline.run(recipe(tracker="trackio"), output_dir=tmp_path / "runs", observer=told)
    first, *epochs, final, end = calls
    assert first[3]["method.temperature"] == 2.0
    assert first[3]["teacher.training.epochs"] == 3
    assert [call[:3] for call in epochs] == [
        *(("epoch", "teacher", n) for n in (1, 2, 3)), *(("epoch", "baseline", n) for n in (1, 2)),
        *(("epoch", "distilled", n) for n in (1, 2)),
    ]  # fmt: skip
    for _, stage, epoch, figures in epochs:
        line = json.loads((path / stage / "metrics.jsonl").read_text().splitlines()[epoch - 1])
        assert figures["val/top1"] == line["val"]["top1"]
        assert figures["train/loss"] == line["train"]["loss"]
        assert "best" not in figures
    assert "train/terms/kd" in epochs[-1][3]
    results = json.loads((path / "results.json").read_text())
    assert final[1]["distilled/test/top1"] == results["stages"]["distilled"]["test"]["top1"]
    assert final[1]["comparison/top1_gain"] == results["comparison"]["top1_gain"]
    assert final[2] == results["comparison"]["verdict"]
    assert end == ("close", True)
    assert told.stages == ["teacher", "baseline", "distilled"]
    assert told.warnings == []


def test_an_interrupted_run_is_no_finished_one(tmp_path, stand_in, told):
    calls = stand_in(Keeps)
    with pytest.raises(KeyboardInterrupt), logging_observer(TRACKIO, tmp_path, {}, told):
        raise KeyboardInterrupt
    assert calls[-1] == ("close", False)


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    """The run without a logger."""
    return pipeline.run(
        recipe(**{"training.threads": "1"}), output_dir=tmp_path_factory.mktemp("plain"), evaluate=False
    )


@pytest.mark.parametrize(
    ("kind", "why"), [(Fails, "SystemExit: the server is gone"), (Hangs, "has not finished within 0.5 seconds")]
)
def test_a_tracker_that_fails_or_hangs_costs_one_warning_and_nothing_else(
    recipe, tmp_path, stand_in, installed, told, plain, kind, why
):
    stand_in(kind)
    path = pipeline.run(
        recipe(tracker="trackio", **{"training.threads": "1"}), output_dir=tmp_path / "runs", observer=told
    )
    (warning,) = [each for each in told.warnings if "tracker" in each]
    assert warning.startswith("tracker trackio has stopped logging this run, which continues without it: ")
    assert warning.endswith(why if kind is Fails else f"it {why}")
    ours, theirs = (load_model(run / "distilled").module.state_dict() for run in (plain, path))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_nobody_waits_for_a_logger_and_its_queue_is_bounded(monkeypatch, stand_in, told):
    monkeypatch.setattr("potstill.loggers.observer.QUEUE_SIZE", 100)
    calls = stand_in(Hangs)
    thread = LoggerThread("trackio", lambda: type("Logger", (Hangs,), {"calls": calls})(TRACKIO[0], None, "", {}))
    for epoch in range(90):
        thread.send(lambda logger, epoch=epoch: logger.epoch("teacher", epoch, {}))
    assert thread.problem is None
    for epoch in range(20):
        thread.send(lambda logger, epoch=epoch: logger.epoch("teacher", epoch, {}))
    assert "100 calls are waiting" in thread.problem
    assert thread.close(60) is None  # at once, and reported before


def test_a_logger_that_cannot_be_imported_or_started_is_a_warning(tmp_path, monkeypatch, stand_in, told):
    stand_in(Keeps)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("potstill.loggers.observer.LoggerThread", refuse)
    with logging_observer(TRACKIO, tmp_path, {}, told) as logging:
        logging.stage("teacher", "")
    monkeypatch.setattr("potstill.loggers.observer.load_logger_class", refuse)
    with logging_observer(TRACKIO, tmp_path, {}, told):
        pass
    assert told.warnings == ["tracker trackio does not log this run: RuntimeError: can't start new thread"] * 2


def test_a_resumed_run_keeps_its_identity_and_may_change_its_trackers(recipe, tmp_path, stand_in, installed):
    calls, root = stand_in(Keeps), tmp_path / "runs"
    pipeline.run(recipe(tracker="trackio"), output_dir=root, evaluate=False)
    before, count = calls[0], len(calls)
    pipeline.run(recipe(tracker="[wandb]"), output_dir=root, resume=True)
    after = calls[count]
    assert (before[1], after[1]) == ("trackio", "wandb")
    assert before[2] == after[2]
    assert [call[0] for call in calls[count + 1 :]] == ["final", "close"]  # all was trained


def test_without_trackers_nothing_is_started(tmp_path, monkeypatch, told):
    monkeypatch.setattr("threading.Thread", lambda *_, **__: pytest.fail("a thread was started"))
    with logging_observer([], tmp_path, {}, told) as logging:
        assert isinstance(logging, LoggingObserver)
        logging.epoch_end({"epoch": 1})
    assert list(tmp_path.iterdir()) == []
