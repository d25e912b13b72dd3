"""Several seeds in one run: baseline and distilled again, whoever teaches them once."""

import json

import numpy as np
import pytest
import torch

from potstill.config import repeat_index, sort_stages, stage_role
from potstill.config.recipe import load_recipe
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.experiment.plan import plan_stages, stage_recipe
from potstill.experiment.run_folder import find_model
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver


class Heard(SilentObserver):
    def __init__(self):
        self.notes, self.stages = [], []

    def note(self, message):
        self.notes.append(message)

    def stage(self, name, detail):
        self.stages.append((name, detail))


def weights(path):
    return load_model(path).module.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def results(path):
    return json.loads((path / "results.json").read_text())


@pytest.fixture(scope="module")
def made(photographs):
    """As ``recipe`` of conftest.py, for the whole module."""

    def make(**changes):
        value = {
            "name": "seeds",
            "data": {"source": str(photographs), "size": 16, "workers": 0, "augment": {"hflip": True, "pad_crop": 0.1}},
            "teacher": {"model": "cifar/resnet14", "training": {"epochs": 2}},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.003, "precision": "float32", "checkpoint_seconds": 0},
        }
        return load_recipe(value, [f"{key}={text}" for key, text in changes.items()])

    return make


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(made, root, tmp_path_factory):
    """A run of two seeds, and what was said."""
    observer = Heard()
    store = tmp_path_factory.mktemp("store")
    path = pipeline.run(made(seeds=2, **{"teacher_cache.folder": store}), output_dir=root, observer=observer)
    return path, observer, store


def test_plan():
    recipe = load_recipe(
        {"teacher": {"model": "a"}, "student": {"model": "b"}, "seeds": 3, "seed": 7}, data_needed=False
    )
    stages = plan_stages(recipe)
    names = ["teacher", "baseline", "distilled", "baseline-2", "distilled-2", "baseline-3", "distilled-3"]
    assert [stage.name for stage in stages] == names
    assert [stage_recipe(recipe, stage).seed for stage in stages] == [7, 7, 7, 8, 8, 9, 9]
    assert {stage.seed for stage in stages[1:]} == {"student"}  # a further seed draws as the first one would with it
    assert all(stage.teachers == ("teacher",) and stage.distils for stage in stages if stage.role == "distilled")
    assert sort_stages(names) == [*names[:2], "baseline-2", "baseline-3", "distilled", "distilled-2", "distilled-3"]
    assert (stage_role("distilled-1"), stage_role("distilled-02"), repeat_index("teacher-3")) == ("", "", 0)


def test_assistants_and_earlier_generations_are_trained_once():
    source = {"teacher": {"model": "a"}, "student": {"model": "b"}, "assistants": [{"model": "c"}]}
    found = plan_stages(load_recipe(source | {"born_again_generations": 2, "seeds": 2}, data_needed=False))
    assert [stage.name for stage in found[-2:]] == ["baseline-2", "distilled-2"]
    assert found[-1].teachers == ("generation-1",)
    assert len(found) == 7


def test_the_second_seed_is_what_a_run_of_that_seed_gives(two, made, root):
    path, _, store = two
    changes = {"seed": 1, "teacher.weights": path / "teacher", "teacher_cache.folder": store}
    alone = pipeline.run(made(**changes), output_dir=root, name="alone")
    for name in ("baseline", "distilled"):
        assert same(weights(path / f"{name}-2"), weights(alone / name))
        assert not same(weights(path / f"{name}-2"), weights(path / name))


def test_the_teacher_is_trained_once_and_asked_once(two):
    path, observer, _ = two
    assert [name for name, _ in observer.stages] == ["teacher", "baseline", "distilled", "baseline-2", "distilled-2"]
    found = results(path)
    assert found["stages"]["distilled"]["teaching"]["computed"] > 0
    # Each seed has views of its own, so its answers are new ones.
    assert (
        found["repeats"]["distilled-2"]["teaching"]["computed"] == found["stages"]["distilled"]["teaching"]["computed"]
    )
    assert found["looks"]["augmentation_seeds"] == 2
    assert "seed 1" in dict(observer.stages)["baseline-2"]


def test_the_seeds_are_said_before_the_first_student_trains(two):
    _, observer, _ = two
    first = "seeds 0, 1: baseline and distilled are trained with each of them, 4 trainings, all with the same teacher"
    assert first in observer.notes


def test_results_hold_every_seed(two):
    path, _, _ = two
    found = results(path)
    assert list(found["stages"]) == ["teacher", "baseline", "distilled"]
    assert list(found["repeats"]) == ["baseline-2", "distilled-2"]
    assert {entry["seed"] for entry in found["repeats"].values()} == {1}
    assert load_model(path / "distilled-2").facts["seed"] == 1
    seeds = found["comparison"]["seeds"]
    tops = {name: entry["test"]["top1"] for name, entry in (found["stages"] | found["repeats"]).items()}
    gains = [tops["distilled"] - tops["baseline"], tops["distilled-2"] - tops["baseline-2"]]
    assert seeds["seeds"] == [0, 1]
    assert [each["top1_gain"] for each in seeds["each"]] == pytest.approx(gains)
    assert seeds["figures"]["top1"]["difference"] == pytest.approx(np.mean(gains))
    assert seeds["top1_gain"]["value"] == pytest.approx(np.mean(gains))
    assert seeds["gap"] == pytest.approx(tops["teacher"] - (tops["baseline"] + tops["baseline-2"]) / 2)
    for name in ("baseline-2", "distilled-2"):
        assert {f"{name}/metrics.jsonl", f"{name}/predictions_test.csv", f"{name}/metrics.json"} <= found[
            "files"
        ].keys()


def test_predict_export_and_serve_take_the_first_seed(two):
    path, _, _ = two
    assert find_model(path) == path / "distilled"
    assert find_model(path / "distilled-2") == path / "distilled-2"


def test_a_run_goes_on_with_more_seeds_and_not_with_fewer(two, made, root):
    path, _, store = two
    before = {name: weights(path / name) for name in ("teacher", "baseline", "distilled", "baseline-2", "distilled-2")}
    stamps = {name: (path / name / "model.safetensors").stat().st_mtime_ns for name in before}
    observer = Heard()
    recipe = made(seeds=3, **{"teacher_cache.folder": store})
    assert pipeline.run(recipe, output_dir=root, resume=True, observer=observer) == path
    assert [name for name, _ in observer.stages] == ["baseline-3", "distilled-3"]
    assert stamps == {name: (path / name / "model.safetensors").stat().st_mtime_ns for name in before}
    assert list(results(path)["repeats"]) == ["baseline-2", "distilled-2", "baseline-3", "distilled-3"]
    found = results(path)
    assert found["comparison"]["seeds"]["figures"]["top1"]["n"] == 3
    assert found["looks"] == found["comparison"]["looks"]
    assert found["looks"]["test_evaluations"] == 2
    assert (found["looks"]["seeds_at_first_look"], found["looks"]["seeds_added_after_look"]) == (2, 1)
    assert found["looks"]["augmentation_seeds"] == 3
    with pytest.raises(UsageError, match="seeds: was 3, now 2"):
        pipeline.run(made(seeds=2, **{"teacher_cache.folder": store}), output_dir=root, resume=True)
    with pytest.raises(UsageError, match="seed: was 0, now 5"):
        pipeline.run(made(seeds=4, seed=5, **{"teacher_cache.folder": store}), output_dir=root, resume=True)


def test_one_seed_is_a_run_as_it_ever_was(made):
    assert [stage.name for stage in plan_stages(made())] == ["teacher", "baseline", "distilled"]


def test_the_flag_and_the_key_are_one_setting():
    recipe = {"teacher": {"model": "cifar/resnet14"}, "student": {"model": "cifar/resnet8"}}
    assert load_recipe(recipe, flags={"--seeds": 4}, data_needed=False).seeds == 4
    assert load_recipe(recipe, ["seeds=2"], flags={"--seeds": 4}, data_needed=False).seeds == 2
    with pytest.raises(UsageError, match=r"--seeds 0: seeds must be"):
        load_recipe(recipe, flags={"--seeds": 0}, data_needed=False)


def test_the_command_line_hands_the_flag_on(monkeypatch):
    from typer.testing import CliRunner

    from potstill.cli import app, run

    seen = {}

    def caught(source, settings, flags, **others):
        seen.update(flags)
        raise UsageError("enough")

    monkeypatch.setattr(run, "_run_pipeline", caught)
    CliRunner().invoke(app, ["run", "quickstart", "--seeds", "5"])
    assert seen["--seeds"] == 5
