"""Few labels and many images: data.unlabeled through whole runs."""

import json

import pytest
import torch

from potstill.errors import DataError, UsageError
from potstill.experiment import pipeline
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver


class Listening(SilentObserver):
    def __init__(self):
        self.notes, self.warnings, self.images = [], [], {}
        self.current = ""

    def stage(self, name, detail):
        self.current = name

    def epoch_start(self, epoch, epochs, steps, images):
        self.images[self.current] = steps, images

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


def results(path):
    return json.loads((path / "results.json").read_text())


def weights(path, stage):
    return load_model(path / stage).module.state_dict()


def test_the_baseline_has_labels_alone_and_all_else_alike(recipe, unlabeled, tmp_path):
    mixing = {"training.epochs": 2, "data.augment": "{hflip: true, mixup: 0.3}"}
    listening = Listening()
    path = pipeline.run(
        recipe(**{"data.unlabeled": unlabeled, **mixing}), output_dir=tmp_path, name="more", observer=listening
    )
    plain = pipeline.run(recipe(**mixing), output_dir=tmp_path, name="plain")
    found = results(path)["data"]["unlabeled"]
    steps, images = listening.images["baseline"]
    assert listening.images["distilled"] == (steps, 2 * images)
    assert found["per_step"] == found["labeled_per_step"]
    assert found["steps"] == 2 * steps
    assert found["passes"] == pytest.approx(2 * images / found["images"], rel=1e-3)
    assert found["sentence"] in listening.notes
    assert results(path)["stages"]["distilled"]["views"] == results(path)["stages"]["baseline"]["views"]
    page = (path / "results.json").read_text()
    assert "learn from the labels alone" in page
    assert "only the distilled student learned from" in results(path)["comparison"]["verdict"]
    for stage in ("teacher", "baseline"):  # the unlabeled images change nothing there, up to the rounding of a mean
        ours, theirs = weights(path, stage), weights(plain, stage)
        assert all(torch.allclose(ours[key].float(), theirs[key].float(), atol=1e-4) for key in ours)
    ours, theirs = weights(path, "distilled"), weights(plain, "distilled")
    assert any(not torch.allclose(ours[key].float(), theirs[key].float(), atol=1e-4) for key in ours)


@pytest.mark.parametrize(
    ("method", "seed"), [("{name: kd, confidence: top}", 5), ("{name: dho, confidence: entropy}", 6)]
)
def test_the_cache_holds_the_unlabeled_images_too(method, seed, recipe, unlabeled, tmp_path):
    changes = {"data.unlabeled": unlabeled, "training.epochs": 4, "teacher_cache.views": 1, "method": method}
    changes |= {"data.augmentation_seed": seed, "data.unlabeled_share": 0.15}

    def run(name, **more):
        return pipeline.run(recipe(**changes, **more), output_dir=tmp_path, name=name, stages=("teacher", "distilled"))

    paths = {mode: run(mode, **{"teacher_cache.mode": mode}) for mode in ("auto", "off")}
    teaching = results(paths["auto"])["stages"]["distilled"]["teaching"]
    found = results(paths["auto"])["data"]["unlabeled"]
    known = found["labeled_images"] + found["images"]
    shown = 4 * found["labeled_images"] + found["passes"] * found["images"]
    assert teaching["computed"] + teaching["read"] == pytest.approx(shown)
    # A batch is computed as a whole: at most one, beside those of the first pass, has images of two passes.
    assert found["labeled_images"] < teaching["computed"] <= known + 16 * 3
    again = run("again")
    assert results(again)["stages"]["distilled"]["teaching"]["computed"] == 0
    ours, theirs = (weights(paths[mode], "distilled") for mode in ("auto", "off"))
    assert all(torch.allclose(ours[key].float(), theirs[key].float(), atol=0.1) for key in ours)


def test_too_few_epochs_for_the_unlabeled_images_are_a_warning(recipe, unlabeled, tmp_path):
    listening = Listening()
    changes = {"data.unlabeled": unlabeled, "data.unlabeled_share": 0.02, "training.epochs": 1}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path, observer=listening)
    assert any("of the unlabeled images: train for more epochs" in text for text in listening.warnings)
    assert any("of the unlabeled images: train for more epochs" in text for text in results(path)["warnings"])


def test_what_would_spoil_the_result_is_refused(recipe, photographs, unlabeled, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, kind, message in (
        (tmp_path / "nowhere", UsageError, "no folder"),
        (tmp_path / "empty", DataError, "no images"),
        (photographs, DataError, "name a folder without them"),
    ):
        with pytest.raises(kind, match=message):
            pipeline.run(recipe(**{"data.unlabeled": folder}), output_dir=tmp_path)
    with pytest.raises(UsageError, match=r"leave data\.unlabeled out, or use kd or dist"):
        pipeline.run(recipe(**{"data.unlabeled": unlabeled, "method": "{name: crd}"}), output_dir=tmp_path)
