"""All trainings of one network compute in one precision, and so does the process that goes on with the run."""

import json

import pytest

from potstill.experiment.pipeline import run
from potstill.experiment.reproduce import read_run_record
from potstill.training import autotune as precisions_module
from potstill.training import devices
from potstill.training.callbacks import SilentObserver


class Watching(SilentObserver):
    """Notes the precision of each stage, by its role; ends after ``stop`` epochs."""

    def __init__(self, stop=None):
        self.stages, self.stop, self.epochs = {}, stop, 0

    def stage(self, name, detail):
        self.stages[name] = detail.rsplit(", ", 1)[1]

    def epoch_end(self, record):
        self.epochs += 1
        if self.epochs == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def hardware(monkeypatch):
    """With bf16, and a clock by which the faster precision is what ``kept`` holds, network by network."""
    kept = []

    def fastest(step, candidates, **_):
        step()
        name = kept.pop(0)
        return name, {each: 0.01 if each == name else 0.02 for each in candidates}

    monkeypatch.setattr(devices, "_has_bf16", lambda device: True)
    monkeypatch.setattr(precisions_module, "select_fastest", fastest)
    monkeypatch.setattr(precisions_module, "MAX_TIMING_SHARE", 1000.0)  # so that this short training is worth timing
    return kept


def environment(folder):
    return json.loads((folder / "environment.json").read_text())


AUTO = {"training.precision": "auto", "training.threads": 1, "teacher.model": "cifar/resnet14"}


def test_baseline_and_distilled_share_one_precision_and_the_teacher_has_its_own(recipe, tmp_path, hardware):
    hardware += ["bf16", "float32"]
    observer = Watching()
    folder = run(recipe(**AUTO), output_dir=tmp_path, observer=observer)
    assert observer.stages == {"teacher": "bf16", "baseline": "float32", "distilled": "float32"}
    assert hardware == []  # each network was timed once
    found = environment(folder)
    assert found["precision"] == "bf16, float32"
    assert found["precisions"]["cifar/resnet8 at 8 px"] == {
        "precision": "float32",
        "calibration": {"bf16": 0.02, "float32": 0.01},
    }


def test_a_run_that_goes_on_or_is_repeated_keeps_what_was_found(recipe, tmp_path, hardware):
    hardware += ["float32", "bf16"]
    with pytest.raises(KeyboardInterrupt):
        run(recipe(**AUTO), output_dir=tmp_path, name="run", observer=Watching(stop=4))  # the baseline's first epoch
    observer = Watching()
    folder = run(recipe(**AUTO), output_dir=tmp_path, name="run", resume=True, observer=observer)
    assert observer.stages == {"baseline": "bf16", "distilled": "bf16"}  # not timed again: nothing is left to give
    assert environment(folder)["precision"] == "bf16, float32"
    observer = Watching()
    again = run(recipe(**AUTO), output_dir=tmp_path, name="again", observer=observer, reproduce=read_run_record(folder))
    assert observer.stages == {"teacher": "float32", "baseline": "bf16", "distilled": "bf16"}
    assert environment(again)["precisions"] == environment(folder)["precisions"]


def test_a_given_precision_is_taken_without_timing(recipe, tmp_path, hardware):
    observer = Watching()
    folder = run(recipe(**AUTO | {"training.precision": "bf16"}), output_dir=tmp_path, observer=observer)
    assert set(observer.stages.values()) == {"bf16"}
    assert "precisions" not in environment(folder)
